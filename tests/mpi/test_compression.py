"""Codecs over real communicators: what all ranks get, what goes over the wire, and that error feedback converges."""

import contextlib
import math
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.compression.base import Codec, Exchange, drive, is_finite
from allreduce_sgd.compression.blocks import Blocks
from allreduce_sgd.compression.cast import Cast
from allreduce_sgd.compression.density import Density
from allreduce_sgd.compression.dgc import DeepGradientCompression
from allreduce_sgd.compression.error_feedback import ErrorFeedback
from allreduce_sgd.compression.int8 import Int8
from allreduce_sgd.compression.powersgd import PowerSGD
from allreduce_sgd.compression.quantized import Quantized, Quantizer
from allreduce_sgd.compression.random_k import RandomK
from allreduce_sgd.compression.sign import Sign
from allreduce_sgd.compression.top_k import TopK
from allreduce_sgd.schedules import ring
from allreduce_sgd.topology import Topology
from tests.compression.codecs import CASES, DGC, FLOATS, Case, assert_law, randn
from tests.mpi.conftest import TIMEOUT_SECONDS, connected

ALL = [*CASES, DGC]


@pytest.fixture(scope="module", params=["mpi", "gloo"])
def lane(request: pytest.FixtureRequest, topology: Topology) -> Iterator[Communicator]:
    """Our own communicator, and another back end."""
    made = connected(topology, request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def flat(topology: Topology) -> Iterator[Communicator]:
    """Messages between ranks only, so that bytes have a closed form."""
    made = connect(topology, torch.device("cpu"), CommunicationOptions("mpi", "ring", timeout_seconds=TIMEOUT_SECONDS))
    yield made
    made.close()


def lengths(size: int) -> list[int]:
    return sorted({0, 1, size - 1, size, size + 1, 65, 3001})


def contribution(rank: int, length: int, turn: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(length, 100 * turn + rank, dtype)


def gathered(comm: Communicator, tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor."""
    bits = tensor.contiguous().view(torch.uint8)
    table = torch.zeros(comm.size, bits.numel(), dtype=torch.uint8)
    table[comm.rank] = bits
    comm.all_gather(table.view(-1)).wait()
    return [row.view(tensor.dtype) for row in table]


def assert_same_bits(comm: Communicator, tensor: Tensor) -> None:
    for other in gathered(comm, tensor):
        assert torch.equal(other.view(torch.uint8), tensor.contiguous().view(torch.uint8))


def tolerance(case: Case, comm: Communicator, dtype: torch.dtype) -> float:
    """How far u may be from the sum of what was sent, in shares of the largest element."""
    if case.name in ("fp16", "bf16") and comm.size > 2:
        # The sum is rounded once more.
        return 2.0**-11 if case.name == "fp16" and dtype is not torch.bfloat16 else 2.0**-8
    return 8 * comm.size * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_all_ranks_get_the_sum_of_what_each_sent(lane: Communicator, case: Case, dtype: torch.dtype) -> None:
    if lane.backend == "gloo" and dtype is not torch.float32:
        pytest.skip("what is sent are bytes, whatever the dtype")
    for length in lengths(lane.size):
        codec = case.make(length, lane.rank)
        for turn in range(3):
            signal = contribution(lane.rank, length, turn, dtype)
            before = signal.clone()
            u, sent = drive(codec.reduce(signal, lane))
            assert torch.equal(signal, before)
            assert u.dtype is sent.dtype is dtype
            assert u.shape == sent.shape == (length,)
            if length == 0:
                continue
            assert_same_bits(lane, u)
            total = torch.stack(gathered(lane, sent)).double().sum(0)
            scale = float(torch.stack(gathered(lane, sent)).double().abs().sum(0).max())
            torch.testing.assert_close(u.double(), total, rtol=0, atol=scale * tolerance(case, lane, dtype))
            # The caller may write to u.
            u.fill_(math.nan)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_feedbacks_law_on_every_rank(lane: Communicator, case: Case) -> None:
    for length in lengths(lane.size):
        codec = ErrorFeedback(case.make(length, lane.rank))
        old = torch.zeros(length)
        for turn in range(4):
            signal = contribution(lane.rank, length, turn)
            _, sent = drive(codec.reduce(signal, lane))
            assert codec.residual is not None
            assert_law(sent, codec.residual, signal + old, case.exact)
            old = codec.residual.clone()


def test_identity_is_the_all_reduce_bit_for_bit_and_keeps_nothing(lane: Communicator) -> None:
    identity = next(case for case in CASES if case.name == "identity")
    for length in lengths(lane.size):
        codec = ErrorFeedback(identity.make(length, lane.rank))
        for turn in range(3):
            signal = contribution(lane.rank, length, turn)
            expected = lane.all_reduce(signal.clone()).wait()
            u, _ = drive(codec.reduce(signal, lane))
            assert torch.equal(u.view(torch.int32), expected.view(torch.int32))
            assert codec.residual is not None
            assert torch.equal(codec.residual, torch.zeros(length))


def test_closed_forms(lane: Communicator) -> None:
    """Sums that every codec's arithmetic gives exactly, or that follow from its definition by hand."""
    size, length = lane.size, 40
    ranks = torch.arange(1.0, size + 1)
    mine = torch.full((length,), float(lane.rank + 1))
    total = float(ranks.sum())
    for codec in (Quantized(Cast(torch.float16)), Quantized(Cast(torch.bfloat16)), Quantized(Sign(8))):
        assert drive(codec.reduce(mine, lane))[0].tolist() == [total] * length
    # The largest element of a block is 127 steps, and arrives to rounding.
    u, _ = drive(Quantized(Int8((0, lane.rank))).reduce(mine, lane))
    torch.testing.assert_close(u, torch.full((length,), total), rtol=1e-6, atol=0)
    # Rank r alone has a large element at r, and all have one at the end.
    spikes = torch.full((length,), 0.125)
    spikes[lane.rank] = spikes[-1] = 8.0
    u, sent = drive(TopK(Density(2 / length)).reduce(spikes, lane))
    assert u.tolist() == [8.0] * size + [0.0] * (length - size - 1) + [8.0 * size]
    assert sent.nonzero().flatten().tolist() == [lane.rank, length - 1]
    # All ranks draw the same elements.
    u, _ = drive(RandomK(Density(0.2), (0,)).reduce(mine, lane))
    assert sorted(u.tolist()) == [0.0] * 32 + [total] * 8
    # The sum of the ranks' matrices has rank one.
    outer = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 9.0)).flatten() * (lane.rank + 1)
    u, _ = drive(PowerSGD([torch.empty(5, 8)], 1, (0,)).reduce(outer, lane))
    torch.testing.assert_close(u, outer / (lane.rank + 1) * total)


def ring_bytes(comm: Communicator, n_elements: int, element_bytes: int = 4) -> int:
    """What this rank sends in an all-reduce."""
    return ring.elements_sent(comm.rank, comm.size, n_elements) * element_bytes


def quantised_bytes(comm: Communicator, quantizer_row_bytes: int) -> int:
    """Rows to all others, in one phase or two."""
    return (1 if comm.size <= 2 else 2) * (comm.size - 1) * quantizer_row_bytes


def row(comm: Communicator, length: int) -> int:
    return length if comm.size <= 2 else -(-length // comm.size)


def int8_row(comm: Communicator, length: int, block: int) -> int:
    blocks = Blocks.of(row(comm, length), block, 1)
    return -(-(4 * blocks.count + blocks.elements) // 4) * 4


def sign_row(comm: Communicator, length: int, block: int) -> int:
    blocks = Blocks.of(row(comm, length), block, 8)
    return -(-(4 * blocks.count + blocks.elements // 8) // 4) * 4


@pytest.mark.parametrize("length", [1, 7, 5000, 60000])
def test_bytes_on_the_wire_have_their_closed_form(flat: Communicator, length: int) -> None:
    ceil = math.ceil
    others = flat.size - 1
    side = int(length**0.5)
    matrix, rest = torch.empty(side, side), torch.empty(length - side * side)
    low_rank = side * side > 4 * side
    first = 2 * side + len(rest) if low_rank else length
    cases: list[tuple[Codec, int]] = [
        (Quantized(Cast(torch.float16)), quantised_bytes(flat, 2 * row(flat, length))),
        (Quantized(Cast(torch.bfloat16)), quantised_bytes(flat, 2 * row(flat, length))),
        (Quantized(Int8((0, flat.rank), 512)), quantised_bytes(flat, int8_row(flat, length, 512))),
        (Quantized(Sign(512)), quantised_bytes(flat, sign_row(flat, length, 512))),
        (TopK(Density(0.01)), others * 8 * ceil(0.01 * length)),
        (DeepGradientCompression(Density(0.001)), others * 8 * ceil(0.001 * length)),
        (RandomK(Density(0.01), (0,)), ring_bytes(flat, ceil(0.01 * length) + 1)),
        (PowerSGD([matrix, rest], 2, (0,)), ring_bytes(flat, first) + ring_bytes(flat, 2 * side if low_rank else 0)),
    ]
    for inner, expected in cases:
        for codec in (inner, ErrorFeedback(inner)):
            started = flat.traffic.bytes_sent
            drive(codec.reduce(contribution(flat.rank, length, 0), flat))
            assert started is not None
            assert flat.traffic.bytes_sent == started + expected, type(inner).__name__


class WithoutMessages:
    """A back end that only has collectives, as Horovod."""

    backend = "horovod"

    def __init__(self, comm: Communicator) -> None:
        self.rank, self.size, self.timeout_seconds, self.traffic = (
            comm.rank,
            comm.size,
            comm.timeout_seconds,
            comm.traffic,
        )
        self.all_gather, self.all_reduce = comm.all_gather, comm.all_reduce


@pytest.mark.parametrize("quantizer", [Cast(torch.bfloat16), Int8((0,)), Sign()], ids=lambda each: type(each).__name__)
def test_a_back_end_without_messages_gathers_all_signals(flat: Communicator, quantizer: Quantizer) -> None:
    codec = ErrorFeedback(Quantized(quantizer))
    comm = cast(Communicator, WithoutMessages(flat))
    for turn in range(3):
        started = flat.traffic.bytes_sent
        assert started is not None
        u, sent = drive(codec.reduce(contribution(flat.rank, 1000, turn), comm))
        assert flat.traffic.bytes_sent == started + (flat.size - 1) * quantizer.row(1000)[1]
        assert_same_bits(flat, u)
        expected, *others = gathered(flat, sent)
        for other in others:
            expected = expected + other
        assert torch.equal(u, expected)


def test_long_signals_shrink_as_promised(flat: Communicator) -> None:
    if flat.size == 1:
        pytest.skip("one rank sends nothing")
    length = 200_000
    whole = ring_bytes(flat, length)
    share = {
        "fp16": (Quantized(Cast(torch.float16)), 1 / 2),
        "int8": (Quantized(Int8((0, flat.rank))), (1 + 4 / 256) / 4),
        "sign": (Quantized(Sign()), (1 + 32 / 256) / 32),
        "random-k": (RandomK(Density(0.01), (0,)), 1 / 100),
        "top-k": (TopK(Density(0.01)), flat.size / 100),
        "powersgd": (PowerSGD([torch.empty(400, 500)], 2, (0,)), 2 * 900 / length),
    }
    for name, (codec, expected) in share.items():
        started = flat.traffic.bytes_sent
        drive(codec.reduce(contribution(flat.rank, length, 0), flat))
        assert started is not None
        assert flat.traffic.bytes_sent is not None
        assert (flat.traffic.bytes_sent - started) / whole == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_an_exchange_waits_no_more_often_than_it_says(lane: Communicator, case: Case) -> None:
    codec = case.make(500, lane.rank)
    if isinstance(codec, Quantized):
        codec = Quantized(Cast(torch.float16), lane.size)
        assert codec.rounds == (1 if lane.size <= 2 else 2)
    exchange = codec.reduce(contribution(lane.rank, 500, 0), lane)
    waits = 0
    with contextlib.suppress(StopIteration):
        while True:
            next(exchange).wait()
            waits += 1
    assert waits == codec.rounds


def test_exchanges_of_many_buckets_overlap_without_mixing(lane: Communicator) -> None:
    def buckets() -> list[tuple[Codec, Tensor]]:
        made = []
        for index, case in enumerate([*ALL, *ALL]):
            length = 500 + 13 * index
            made.append((case.make(length, lane.rank), contribution(lane.rank, length, index)))
        return made

    alone = [[tensor.clone() for tensor in drive(codec.reduce(signal, lane))] for codec, signal in buckets()]
    started: list[tuple[int, Exchange, Work]] = []
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for index, (codec, signal) in enumerate(buckets()):
        exchange = codec.reduce(signal, lane)
        started.append((index, exchange, next(exchange)))
    # Phase by phase, as an engine with many buckets in flight does.
    while started:
        later = []
        for index, exchange, work in started:
            work.wait()
            try:
                later.append((index, exchange, next(exchange)))
            except StopIteration as end:
                results[index] = end.value
        started = later
    for index, expected in enumerate(alone):
        for left, right in zip(results[index], expected, strict=True):
            # Gloo's order of summation may depend on what else is under way.
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_not_finite_on_one_rank_shows_on_all_and_is_kept_by_none(
    lane: Communicator, case: Case, bad: float
) -> None:
    length = 301
    for culprit, position in zip(range(lane.size), (0, 150, length - 1, 7), strict=False):
        codec = ErrorFeedback(case.make(length, lane.rank))
        drive(codec.reduce(contribution(lane.rank, length, 0), lane))
        assert codec.residual is not None
        before = codec.residual.clone()
        signal = contribution(lane.rank, length, 1)
        if lane.rank == culprit:
            signal[position] = bad
        u, _ = drive(codec.reduce(signal, lane))
        assert not is_finite(u)
        assert_same_bits(lane, torch.isfinite(u))
        assert torch.equal(codec.residual, before)
        u, _ = drive(codec.reduce(contribution(lane.rank, length, 2), lane))
        assert is_finite(u)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_saved_state_goes_on_bit_for_bit_on_every_rank(flat: Communicator, case: Case) -> None:
    length = 777

    def make() -> Codec:
        return case.make(length, flat.rank) if case is DGC else ErrorFeedback(case.make(length, flat.rank))

    original, restored = make(), make()
    for turn in range(8):
        if turn == 4:
            restored = make()
            restored.load_state_dict(original.state_dict())
        signal = contribution(flat.rank, length, turn)
        results = [[tensor.clone() for tensor in drive(codec.reduce(signal, flat))] for codec in (original, restored)]
        for left, right in zip(*results, strict=True):
            assert torch.equal(left, right)


def descend(comm: Communicator, codec: Codec, steps: int, lr: float) -> float:
    """The excess loss of the mean of all ranks' quadratics ½ (x - aᵢ)ᵀ D (x - aᵢ), over that at the start."""
    length = 120
    curvatures = torch.linspace(0.2, 1.0, length)
    # Every rank pulls to a place of its own, so that no rank's gradient vanishes at the minimum of the mean.
    targets = [contribution(rank, length, 9) + 1 for rank in range(comm.size)]
    minimum = torch.stack(targets).mean(0)
    x = torch.zeros(length)

    def excess() -> float:
        return float((curvatures * (x - minimum) ** 2).sum())

    start = excess()
    for turn in range(steps):
        gradient = curvatures * (x - targets[comm.rank]) / comm.size
        u, _ = drive(codec.reduce(gradient, comm))
        # Steps that shrink, as error feedback's bound on what is kept asks for.
        x -= lr / (1 + 4 * turn / steps) * u
    assert_same_bits(comm, x)
    return excess() / start


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_error_feedback_converges_like_no_compression(comm: Communicator, case: Case) -> None:
    if comm.size > 3:
        pytest.skip("thousands of exchanges, which show nothing that three ranks do not")
    length = 120
    if case is DGC:
        codec: Codec = DeepGradientCompression(Density(0.1), momentum=0.5)
    elif case.name == "powersgd":
        codec = ErrorFeedback(PowerSGD([torch.empty(10, 12)], 1, (0,)))
    else:
        codec = ErrorFeedback(case.make(length, comm.rank))
    excess = descend(comm, codec, 400, 0.3)
    assert excess < (1e-9 if case.name == "identity" else 1e-3)


def test_sign_needs_error_feedback(comm: Communicator) -> None:
    if comm.size > 3:
        pytest.skip("thousands of exchanges, which show nothing that three ranks do not")
    # Without it, elements far larger and far smaller than the mean of their block are moved at the same pace.
    without = descend(comm, Quantized(Sign()), 400, 0.3)
    assert without > 10 * descend(comm, ErrorFeedback(Quantized(Sign())), 400, 0.3)


def test_all_ranks_agree_after_many_steps(comm: Communicator) -> None:
    for case in ALL:
        codec = case.make(2000, comm.rank)
        digest = 0.0
        for turn in range(10):
            u, _ = drive(codec.reduce(contribution(comm.rank, 2000, turn), comm))
            digest += float(u.double().sum())
        assert len(set(all_gather_object(comm, digest))) == 1
