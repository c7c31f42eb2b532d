"""One table of tests over all communicators: every operation and dtype against closed forms."""

import math
import time

import pytest
import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import CommunicationError, CommunicationTimeout
from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import TIMEOUT_SECONDS

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.uint8]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64]


def lengths(size: int) -> list[int]:
    return sorted({0, 1, size - 1, size, size + 1, 2 * size + 1, 1000})


def device_of(comm: Communicator) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if comm.backend == "nccl" else torch.device("cpu")


def contribution(rank: int, length: int, dtype: torch.dtype, comm: Communicator) -> Tensor:
    """Rank r gives (r + 1) * (i mod 3 + 1): small whole numbers, exact in every dtype."""
    values = (torch.arange(length) % 3 + 1) * (rank + 1)
    if dtype is torch.bool:
        values = (torch.arange(length) + rank) % comm.size == 0
    return values.to(dtype).to(device_of(comm))


def expected(op: ReduceOp, length: int, dtype: torch.dtype, comm: Communicator) -> Tensor:
    size, base = comm.size, torch.arange(length) % 3 + 1
    if dtype is torch.bool:
        alone = torch.ones(length, dtype=torch.bool) if size == 1 else torch.zeros(length, dtype=torch.bool)
        either = torch.arange(length) % size < size
        return (either if op in (ReduceOp.SUM, ReduceOp.MAX) else alone).to(device_of(comm))
    values = {
        ReduceOp.SUM: base * (size * (size + 1) // 2),
        ReduceOp.AVERAGE: base * (size + 1) / 2,
        ReduceOp.MIN: base,
        ReduceOp.MAX: base * size,
        ReduceOp.PRODUCT: base**size * math.factorial(size),
    }[op]
    return values.to(dtype).to(device_of(comm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ReduceOp)
def test_all_reduce(any_comm: Communicator, op: ReduceOp, dtype: torch.dtype) -> None:
    for length in lengths(any_comm.size):
        buffer = contribution(any_comm.rank, length, dtype, any_comm)
        undefined = op is ReduceOp.AVERAGE and not (dtype.is_floating_point or dtype.is_complex)
        undefined |= dtype.is_complex and op in (ReduceOp.MIN, ReduceOp.MAX)
        # The libraries behind torch.distributed cannot multiply complex numbers; ours can.
        undefined |= dtype.is_complex and op is ReduceOp.PRODUCT and any_comm.backend in ("gloo", "nccl")
        if undefined:
            if length and (any_comm.size > 1 or op is not ReduceOp.PRODUCT):
                with pytest.raises(ValueError, match=r"not defined|no product"):
                    any_comm.all_reduce(buffer, op)
            continue
        result = any_comm.all_reduce(buffer, op).wait()
        assert result.data_ptr() == buffer.data_ptr()
        # Averages of float16 are divided before they are added, and a third has no exact half-precision form.
        rtol = 1e-3 if op is ReduceOp.AVERAGE and dtype is torch.float16 else 0
        torch.testing.assert_close(buffer, expected(op, length, dtype, any_comm), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_reduce_gives_the_same_bits_on_all_ranks_and_every_time(any_comm: Communicator, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(any_comm.rank)
    start = torch.randn(997, generator=generator).to(dtype).to(device_of(any_comm))
    results = [any_comm.all_reduce(start.clone()).wait().cpu().view(torch.uint8).tolist() for _ in range(3)]
    assert results[0] == results[1] == results[2]
    assert all(other == results[0] for other in all_gather_object(any_comm, results[0]))


def test_half_precision_average_does_not_overflow(any_comm: Communicator) -> None:
    buffer = torch.full((7,), 60000.0, dtype=torch.float16, device=device_of(any_comm))
    any_comm.all_reduce(buffer, ReduceOp.AVERAGE).wait()
    torch.testing.assert_close(buffer, torch.full_like(buffer, 60000.0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_from_every_root(any_comm: Communicator, dtype: torch.dtype) -> None:
    for root in range(any_comm.size):
        for length in lengths(any_comm.size):
            buffer = contribution(any_comm.rank, length, dtype, any_comm)
            any_comm.broadcast(buffer, root).wait()
            torch.testing.assert_close(buffer, contribution(root, length, dtype, any_comm), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gather(any_comm: Communicator, dtype: torch.dtype) -> None:
    for length in lengths(any_comm.size):
        wanted = torch.cat(
            [
                contribution(rank, length, dtype, any_comm)[chunk(length, any_comm.size, rank)]
                for rank in range(any_comm.size)
            ]
        )
        own = chunk(length, any_comm.size, any_comm.rank)
        buffer = torch.zeros(length, dtype=dtype, device=device_of(any_comm))
        buffer[own] = wanted[own]
        any_comm.all_gather(buffer).wait()
        torch.testing.assert_close(buffer, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_scatter(any_comm: Communicator, dtype: torch.dtype) -> None:
    for length in lengths(any_comm.size):
        buffer = contribution(any_comm.rank, length, dtype, any_comm)
        any_comm.reduce_scatter(buffer).wait()
        own = chunk(length, any_comm.size, any_comm.rank)
        torch.testing.assert_close(buffer[own], expected(ReduceOp.SUM, length, dtype, any_comm)[own], rtol=0, atol=0)


def test_many_in_flight_keep_their_order_and_values(any_comm: Communicator) -> None:
    buffers = [
        torch.full((100 + index,), float(index + any_comm.rank), device=device_of(any_comm)) for index in range(60)
    ]
    works = [any_comm.all_reduce(buffer) for buffer in buffers]
    ranks = any_comm.size * (any_comm.size - 1) / 2
    for index in reversed(range(60)):
        result = works[index].wait()
        assert works[index].done()
        torch.testing.assert_close(result, torch.full_like(result, any_comm.size * index + ranks))


def test_messages_in_a_circle_beside_collectives(any_comm: Communicator) -> None:
    if any_comm.backend == "single":
        with pytest.raises(CommunicationError, match="nobody"):
            any_comm.send(torch.ones(1), 0)
        return
    if any_comm.size == 1:
        pytest.skip("needs a second rank")
    right, left = (any_comm.rank + 1) % any_comm.size, (any_comm.rank - 1) % any_comm.size
    device = device_of(any_comm)
    for dtype in (*FLOATS, *INTEGERS, torch.complex64):
        collective = any_comm.all_reduce(torch.ones(5, device=device))
        arrived = torch.zeros(33, dtype=dtype, device=device)
        receive = any_comm.receive(arrived, left, tag=7)
        send = any_comm.send(torch.full((33,), any_comm.rank + 1, dtype=dtype, device=device), right, tag=7)
        torch.testing.assert_close(receive.wait(), torch.full_like(arrived, left + 1))
        send.wait()
        torch.testing.assert_close(collective.wait(), torch.full((5,), float(any_comm.size), device=device))


def test_receive_from_any_rank(any_comm: Communicator) -> None:
    if any_comm.size == 1 or any_comm.backend == "nccl":
        pytest.skip("needs a second rank, and a back end that can receive from any")
    if any_comm.rank == 0:
        total = 0.0
        for _ in range(any_comm.size - 1):
            total += float(any_comm.receive(torch.zeros(1), None, tag=3).wait())
        assert total == sum(range(1, any_comm.size))
    else:
        any_comm.send(torch.tensor([float(any_comm.rank)]), 0, tag=3).wait()
    any_comm.barrier().wait()


def test_split_into_even_and_odd_ranks_in_reverse(any_comm: Communicator) -> None:
    part = any_comm.split(any_comm.rank % 2, key=-any_comm.rank)
    members = [rank for rank in range(any_comm.size) if rank % 2 == any_comm.rank % 2]
    assert part.size == len(members)
    assert part.rank == sorted(members, reverse=True).index(any_comm.rank)
    total = part.all_reduce(torch.tensor([any_comm.rank], device=device_of(any_comm))).wait()
    assert int(total) == sum(members)
    part.close()


def test_non_contiguous_and_sparse_tensors_are_refused_clearly(any_comm: Communicator) -> None:
    scattered = torch.zeros(4, 6, device=device_of(any_comm)).t()
    for operation in (any_comm.all_reduce, any_comm.broadcast, any_comm.all_gather, any_comm.reduce_scatter):
        with pytest.raises(ValueError, match="contiguous"):
            operation(scattered)
        with pytest.raises(ValueError, match="cannot be sent"):
            operation(torch.eye(3).to_sparse())


def test_non_contiguous_messages_are_refused_clearly(any_comm: Communicator) -> None:
    if any_comm.backend == "single":
        pytest.skip("has no peers")
    scattered = torch.zeros(4, 6, device=device_of(any_comm)).t()
    with pytest.raises(ValueError, match="contiguous"):
        any_comm.send(scattered, 0)
    with pytest.raises(ValueError, match="contiguous"):
        any_comm.receive(scattered, 0)


def test_allocated_memory_is_zeroed_and_reduces(any_comm: Communicator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        buffer = any_comm.allocate(33, dtype, device_of(any_comm))
        assert (buffer.shape, buffer.dtype, float(buffer.abs().sum())) == ((33,), dtype, 0.0)
        buffer.fill_(1)
        any_comm.all_reduce(buffer).wait()
        assert buffer.tolist() == [any_comm.size] * 33


def test_tensors_that_require_gradients_are_taken_as_data(any_comm: Communicator) -> None:
    parameter = torch.ones(3, requires_grad=True, device=device_of(any_comm))
    any_comm.all_reduce(parameter).wait()
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, any_comm.size))


def test_channels_last_is_refused_rather_than_mangled(any_comm: Communicator) -> None:
    image = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="strides"):
        any_comm.all_reduce(image)


def test_a_wait_ends_at_its_deadline_and_may_be_repeated(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    buffer = torch.ones(10)
    if comm.rank == 0:
        time.sleep(2.0)
        comm.all_reduce(buffer).wait()
    else:
        work = comm.all_reduce(buffer)
        started = time.monotonic()
        with pytest.raises(CommunicationTimeout, match=r"all_reduce of 10 float32 .*0\.2 s"):
            work.wait(timeout=0.2)
        assert time.monotonic() - started < 1.8
        work.wait()
    torch.testing.assert_close(buffer, torch.full((10,), float(comm.size)))


def test_a_gloo_wait_ends_at_its_deadline(any_comm: Communicator) -> None:
    if any_comm.backend != "gloo" or any_comm.size == 1:
        pytest.skip("Gloo with a second rank")
    # In a group of its own: a wait that Gloo gave up breaks the group.
    part = any_comm.split(0)
    if part.rank == 0:
        time.sleep(1.5)
    else:
        work = part.all_reduce(torch.ones(10))
        with pytest.raises(CommunicationTimeout, match="all_reduce of 10 float32"):
            work.wait(timeout=0.2)
    any_comm.barrier().wait()


def test_sent_bytes_are_those_of_the_ring(topology: Topology) -> None:
    options = CommunicationOptions("mpi", algorithm="ring", timeout_seconds=TIMEOUT_SECONDS)
    comm = connect(topology, torch.device("cpu"), options)
    size, rank = comm.size, comm.rank
    for length in (0, 1, size, 1000):
        before = comm.traffic.bytes_sent or 0
        comm.all_reduce(torch.ones(length)).wait()
        sent = (comm.traffic.bytes_sent or 0) - before
        kept = [chunk(length, size, index) for index in (rank, rank + 1)]
        assert sent == (0 if size == 1 else 4 * (2 * length - sum(piece.stop - piece.start for piece in kept)))
    comm.close()


def test_traffic_counts_seconds(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    busy, waited = comm.traffic.busy_seconds, comm.traffic.waited_seconds
    started = time.perf_counter()
    comm.all_reduce(torch.ones(1_000_000)).wait()
    elapsed = time.perf_counter() - started
    assert 0 < comm.traffic.busy_seconds - busy <= elapsed
    assert 0 < comm.traffic.waited_seconds - waited <= elapsed


def test_a_closed_communicator_says_so(any_comm: Communicator) -> None:
    if any_comm.backend == "single":
        pytest.skip("has nothing to close")
    part = any_comm.split(0)
    part.close()
    part.close()
    with pytest.raises(CommunicationError, match="closed"):
        part.all_reduce(torch.ones(1))


def test_a_peer_that_does_not_exist_is_refused(any_comm: Communicator) -> None:
    if any_comm.backend == "single":
        pytest.skip("has no peers")
    with pytest.raises(ValueError, match=f"rank {any_comm.size} is outside"):
        any_comm.broadcast(torch.ones(1), root=any_comm.size)
    with pytest.raises(ValueError, match="outside"):
        any_comm.send(torch.ones(1), any_comm.size)


def test_values_travel_as_objects(any_comm: Communicator) -> None:
    values = all_gather_object(any_comm, {"rank": any_comm.rank, "text": "é" * any_comm.rank})
    assert values == [{"rank": rank, "text": "é" * rank} for rank in range(any_comm.size)]
