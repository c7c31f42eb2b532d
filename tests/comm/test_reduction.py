"""The arithmetic of all reductions, against float64 and against sums written out one by one."""

from collections.abc import Callable
from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allreduce_sgd.comm import reduction
from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.reduction import accumulator_dtype, combine, finish, reduce_into

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.uint8]
CASES = [(dtype, op) for dtype in FLOATS for op in ReduceOp]
CASES += [(dtype, op) for dtype in [*WHOLE, torch.bool] for op in ReduceOp if op is not ReduceOp.AVERAGE]

# In place of 256 KiB, so that short buffers have many blocks: 64 elements of float32.
BLOCK_BYTES = 256
LENGTHS = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000]

BINARY: dict[ReduceOp, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVERAGE: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.PRODUCT: torch.mul,
}


@pytest.fixture(autouse=True, scope="module")
def _short_blocks() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "_BLOCK_BYTES", BLOCK_BYTES)
        yield


def data(count: int, length: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Buffers of which no op overflows `dtype`; floats so different in size that the order of a sum shows."""
    generator = torch.Generator().manual_seed(1000 * length + 10 * count + seed)
    if dtype is torch.bool:
        return [torch.randint(0, 2, (length,), generator=generator) > 0 for _ in range(count)]
    if not dtype.is_floating_point:
        return [torch.randint(0, 4, (length,), generator=generator).to(dtype) for _ in range(count)]
    sizes = [10.0 ** torch.randint(-3, 1, (length,), generator=generator) for _ in range(count)]
    return [(torch.randn(length, generator=generator) * size).to(dtype) for size in sizes]


def one_by_one(sources: list[Tensor], op: ReduceOp, ranks: int | None) -> Tensor:
    """The definition: ((s_0 op s_1) op s_2) ... in the accumulator's dtype, divided, and rounded once."""
    dtype = sources[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = reduce(BINARY[op], [source.to(wide) for source in sources])
    if ranks is not None and op is ReduceOp.AVERAGE:
        total = total / ranks
    return total.to(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype is right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("dtype", "op"), CASES, ids=str)
def test_every_dtype_and_op(dtype: torch.dtype, op: ReduceOp, count: int) -> None:
    for length in LENGTHS:
        sources = data(count, length, dtype)
        kept = [source.clone() for source in sources]
        target = torch.full((length,), 1, dtype=dtype)
        reduce_into([target], sources, op, count)
        assert same_bits(target, one_by_one(sources, op, count)), length
        assert all(same_bits(source, before) for source, before in zip(sources, kept, strict=True))
        exact = torch.stack([source.double() for source in sources])
        wanted = {
            ReduceOp.SUM: exact.sum(0).clamp(max=1) if dtype is torch.bool else exact.sum(0),
            ReduceOp.AVERAGE: exact.mean(0),
            ReduceOp.MIN: exact.amin(0),
            ReduceOp.MAX: exact.amax(0),
            ReduceOp.PRODUCT: exact.prod(0),
        }[op]
        if dtype.is_floating_point:
            # Half a unit in the last place for the one rounding of a narrow float, and `count` of them in the sum.
            wide = accumulator_dtype(dtype, op)
            unit = torch.finfo(dtype).eps / 2 + count * torch.finfo(wide).eps
            largest = torch.where(torch.tensor(op is ReduceOp.PRODUCT), wanted.abs(), exact.abs().sum(0))
            tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            allowed = torch.finfo(dtype).eps / 2 * wanted.abs() + unit * largest + tiny
            assert bool(((target.double() - wanted).abs() <= allowed).all()), length
        else:
            assert torch.equal(target.double(), wanted), length


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_blocks_of_their_true_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "_BLOCK_BYTES", 256 * 1024)
    block = 256 * 1024 // accumulator_dtype(dtype, ReduceOp.SUM).itemsize
    for length in (block - 1, block, block + 1, 3 * block + 17):
        sources = data(3, length, dtype)
        targets = [torch.empty(length, dtype=dtype) for _ in range(2)]
        reduce_into(targets, sources, ReduceOp.SUM, 3)
        assert all(same_bits(target, one_by_one(sources, ReduceOp.SUM, 3)) for target in targets)


def test_complex_numbers() -> None:
    sources = [torch.complex(*data(2, 200, torch.float32, seed)) for seed in range(3)]
    for op in (ReduceOp.SUM, ReduceOp.AVERAGE, ReduceOp.PRODUCT):
        target = torch.empty(200, dtype=torch.complex64)
        reduce_into([target], sources, op, 3)
        torch.testing.assert_close(target, one_by_one(sources, op, 3))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.AVERAGE, ReduceOp.MAX])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_targets_that_are_sources(dtype: torch.dtype, op: ReduceOp, count: int) -> None:
    if op is ReduceOp.AVERAGE and not dtype.is_floating_point:
        pytest.skip("no average of whole numbers")
    for length in (1, 64, 129, 1000):
        start = data(count, length, dtype)
        wanted = one_by_one(start, op, count)
        for position in range(count):
            sources = [source.clone() for source in start]
            reduce_into([sources[position]], sources, op, count)
            for index, source in enumerate(sources):
                assert same_bits(source, wanted if index == position else start[index])
            # Some of them, the last one first, and one that is no source.
            sources, other = [source.clone() for source in start], torch.zeros(length, dtype=dtype)
            reduce_into([*reversed(sources[: position + 1]), other], sources, op, count)
            assert same_bits(other, wanted)
            for index, source in enumerate(sources):
                assert same_bits(source, wanted if index <= position else start[index])


def test_targets_and_sources_that_are_pieces_of_larger_buffers() -> None:
    start = data(3, 1000, torch.float32)
    buffers = [buffer.clone() for buffer in start]
    piece = slice(333, 667)
    pieces = [buffer[piece] for buffer in buffers]
    reduce_into(pieces, pieces, ReduceOp.SUM, 3)
    for buffer, before in zip(buffers, start, strict=True):
        assert same_bits(buffer[piece], one_by_one([each[piece] for each in start], ReduceOp.SUM, 3))
        assert same_bits(buffer[: piece.start], before[: piece.start])
        assert same_bits(buffer[piece.stop :], before[piece.stop :])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_average_is_left_to_others_where_more_is_to_be_added(dtype: torch.dtype) -> None:
    for count in (1, 2, 3):
        sources = data(count, 200, dtype)
        sums, averages = torch.empty(200, dtype=dtype), torch.empty(200, dtype=dtype)
        reduce_into([sums], sources, ReduceOp.AVERAGE, None)
        assert same_bits(sums, one_by_one(sources, ReduceOp.SUM, None))
        # Over more ranks than brought a source here.
        reduce_into([averages], sources, ReduceOp.AVERAGE, 7)
        assert same_bits(averages, one_by_one(sources, ReduceOp.AVERAGE, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_wide_target_is_not_rounded(dtype: torch.dtype) -> None:
    for count in (1, 2, 3, 5):
        sources = data(count, 300, dtype)
        total = torch.empty(300)
        reduce_into([total], sources, ReduceOp.SUM, None)
        assert same_bits(total, one_by_one([source.float() for source in sources], ReduceOp.SUM, None))


def test_narrow_floats_are_accumulated_in_float32_and_rounded_once() -> None:
    # One by one, 256 + 1 rounds back to 256 in bfloat16 and 2048 + 1 to 2048 in float16.
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        sources = [torch.full((70,), value, dtype=dtype) for value in (large, 1.0, 1.0, 1.0, 1.0)]
        for position in range(5):
            target = sources[position].clone()
            reduce_into([target], [*sources[:position], target, *sources[position + 1 :]], ReduceOp.SUM, 5)
            assert torch.equal(target, torch.full((70,), large + 4, dtype=dtype))


def test_the_average_of_float16_does_not_overflow_on_the_way() -> None:
    sources = [torch.full((70,), 60_000.0, dtype=torch.float16) for _ in range(5)]
    average, total = (torch.empty(70, dtype=torch.float16) for _ in range(2))
    reduce_into([average], sources, ReduceOp.AVERAGE, 5)
    assert torch.equal(average, sources[0])
    reduce_into([total], sources, ReduceOp.SUM, 5)
    assert bool(total.isinf().all())


def test_not_a_number_is_not_lost() -> None:
    sources = [torch.ones(100) for _ in range(3)]
    sources[1][7] = float("nan")
    for op in ReduceOp:
        target = torch.empty(100)
        reduce_into([target], sources, op, 3)
        assert bool(target[7].isnan()), op
        assert int(target.isnan().sum()) == 1, op


@given(data_=st.data())
@settings(max_examples=150, deadline=None)
def test_the_bits_do_not_depend_on_where_a_buffer_is_cut(data_: st.DataObject) -> None:
    dtype, op = data_.draw(st.sampled_from(CASES))
    count = data_.draw(st.integers(1, 5))
    length = data_.draw(st.integers(1, 700))
    cuts = data_.draw(st.lists(st.integers(0, length), max_size=8).map(sorted))
    target_count = data_.draw(st.integers(1, 3))
    own = data_.draw(st.none() | st.integers(0, count - 1))
    sources = data(count, length, dtype)
    # Offsets into a larger buffer change what the processor's vectors hold, too.
    offset = data_.draw(st.integers(0, 9))
    whole = torch.empty(length, dtype=dtype)
    reduce_into([whole], sources, op, count)
    targets = [torch.empty(offset + length, dtype=dtype)[offset:] for _ in range(target_count)]
    if own is not None:
        targets[0] = sources[own]
    for start, stop in pairwise([0, *cuts, length]):
        piece = slice(start, stop)
        reduce_into([target[piece] for target in targets], [source[piece] for source in sources], op, count)
    assert all(same_bits(target, whole) for target in targets)


def test_combining_by_hand_is_the_same() -> None:
    for dtype, op in CASES:
        wide = accumulator_dtype(dtype, op)
        assert wide is (torch.float32 if dtype in FLOATS[2:] and op not in (ReduceOp.MIN, ReduceOp.MAX) else dtype)
        first, second = data(2, 100, dtype)
        total = first.to(wide, copy=True)
        combine(op, total, second.to(wide), total)
        finish(op, total, 2)
        assert same_bits(total.to(dtype), one_by_one([first, second], op, 2))
