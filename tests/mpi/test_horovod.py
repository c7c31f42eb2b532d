"""The table of all communicators, on Horovod where it is installed and on a stand-in that is as strict everywhere."""

import sys
import time
from collections.abc import Iterator

import pytest
import torch

from allreduce_sgd.comm import horovod
from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.errors import CommunicationError, CommunicationTimeout
from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.topology import Topology
from tests.horovod_stand_in import stand_in
from tests.mpi import test_communicator as table
from tests.mpi.test_communicator import (
    test_a_closed_communicator_says_so,
    test_a_wait_ends_at_its_deadline_and_may_be_repeated,
    test_all_gather,
    test_all_reduce_gives_the_same_bits_on_all_ranks_and_every_time,
    test_allocated_memory_is_zeroed_and_reduces,
    test_broadcast_from_every_root,
    test_channels_last_is_refused_rather_than_mangled,
    test_half_precision_average_does_not_overflow,
    test_many_in_flight_keep_their_order_and_values,
    test_non_contiguous_and_sparse_tensors_are_refused_clearly,
    test_reduce_scatter,
    test_split_into_even_and_odd_ranks_in_reverse,
    test_tensors_that_require_gradients_are_taken_as_data,
    test_traffic_counts_seconds,
    test_values_travel_as_objects,
)

__all__ = [
    "test_a_closed_communicator_says_so",
    "test_a_wait_ends_at_its_deadline_and_may_be_repeated",
    "test_all_gather",
    "test_all_reduce_gives_the_same_bits_on_all_ranks_and_every_time",
    "test_allocated_memory_is_zeroed_and_reduces",
    "test_broadcast_from_every_root",
    "test_channels_last_is_refused_rather_than_mangled",
    "test_half_precision_average_does_not_overflow",
    "test_many_in_flight_keep_their_order_and_values",
    "test_non_contiguous_and_sparse_tensors_are_refused_clearly",
    "test_reduce_scatter",
    "test_split_into_even_and_odd_ranks_in_reverse",
    "test_tensors_that_require_gradients_are_taken_as_data",
    "test_traffic_counts_seconds",
    "test_values_travel_as_objects",
]

TIMEOUT_SECONDS = 60.0


@pytest.fixture(scope="module", params=["stand-in", "horovod"])
def any_comm(request: pytest.FixtureRequest, topology: Topology) -> Iterator[Communicator]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        else:
            pytest.importorskip("horovod.torch", exc_type=ImportError)
        made = horovod.connect(topology, torch.device("cpu"), TIMEOUT_SECONDS)
        yield made
        made.close()


@pytest.fixture(scope="module")
def comm(any_comm: Communicator) -> Communicator:
    return any_comm


@pytest.mark.parametrize("dtype", table.DTYPES, ids=str)
@pytest.mark.parametrize("op", ReduceOp)
def test_all_reduce(any_comm: Communicator, op: ReduceOp, dtype: torch.dtype) -> None:
    if not (dtype.is_complex and op is ReduceOp.PRODUCT):
        table.test_all_reduce(any_comm, op, dtype)
    elif any_comm.size > 1:
        with pytest.raises(ValueError, match="no product of complex"):
            any_comm.all_reduce(torch.ones(3, dtype=dtype), op)


@pytest.mark.parametrize("dtype", table.DTYPES, ids=str)
@pytest.mark.parametrize("op", [ReduceOp.AVERAGE, ReduceOp.MIN, ReduceOp.MAX, ReduceOp.PRODUCT])
def test_reduce_scatter_of_every_operation(any_comm: Communicator, op: ReduceOp, dtype: torch.dtype) -> None:
    if dtype.is_complex or (op is ReduceOp.AVERAGE and not dtype.is_floating_point):
        pytest.skip("not defined")
    for length in table.lengths(any_comm.size):
        buffer = table.contribution(any_comm.rank, length, dtype, any_comm)
        any_comm.reduce_scatter(buffer, op).wait()
        own = chunk(length, any_comm.size, any_comm.rank)
        rtol = 1e-3 if op is ReduceOp.AVERAGE and dtype is torch.float16 else 0
        wanted = table.expected(op, length, dtype, any_comm)[own]
        torch.testing.assert_close(buffer[own], wanted, rtol=rtol, atol=0)


def test_a_blocking_all_reduce_is_done_on_return(any_comm: Communicator) -> None:
    work = any_comm.all_reduce(torch.ones(5), shared_result=True, blocking=True)
    assert work.done()
    assert work.wait().tolist() == [float(any_comm.size)] * 5


def test_small_integers_wrap_as_torch_does(any_comm: Communicator) -> None:
    buffer = any_comm.all_reduce(torch.full((5,), 200, dtype=torch.uint8)).wait()
    assert buffer.tolist() == [200 * any_comm.size % 256] * 5
    buffer = any_comm.all_reduce(torch.full((5,), -3, dtype=torch.int8), ReduceOp.MIN).wait()
    assert buffer.tolist() == [-3] * 5


def test_names_return_after_a_while(any_comm: Communicator) -> None:
    """More operations than names, of other kinds and lengths under a name's second use, all of them in flight."""
    for _ in range(2):
        works = [any_comm.all_reduce(torch.full((index % 5 + 1,), float(index))) for index in range(300)]
        works.append(any_comm.broadcast(torch.full((4,), float(any_comm.rank)), root=any_comm.size - 1))
        works.append(any_comm.all_gather(torch.ones(7, dtype=torch.bool)))
        for index in range(300):
            assert works[index].wait().tolist() == [float(index * any_comm.size)] * (index % 5 + 1)
        assert works[300].wait().tolist() == [float(any_comm.size - 1)] * 4
        assert works[301].wait().tolist() == [True] * 7


def test_what_nobody_waited_for_ends_too(any_comm: Communicator) -> None:
    part = any_comm.split(0)
    buffer = torch.ones(3)
    part.all_reduce(buffer)
    part.close()
    assert buffer.tolist() == [float(any_comm.size)] * 3


def test_parts_made_twice_or_of_one_rank_or_in_reverse_work(any_comm: Communicator) -> None:
    size, rank = any_comm.size, any_comm.rank
    for _ in range(2):
        for color, key in ((0, -rank), (rank % 2, rank), (rank, 0), (rank // 2, -rank)):
            part = any_comm.split(color, key)
            if color == 0 and part.size == size and key == -rank:
                assert part.rank == size - 1 - rank
            values = torch.zeros(2 * part.size + 1, dtype=torch.int16)
            own = chunk(len(values), part.size, part.rank)
            values[own] = rank
            gathered = part.all_gather(values).wait()
            scattered = part.reduce_scatter(gathered.clone()).wait()[own]
            assert scattered.tolist() == (gathered[own] * part.size).tolist() == [rank * part.size] * len(scattered)
            first = part.broadcast(torch.tensor([rank]), root=0).wait()
            assert int(first) == int(gathered[0])
            part.barrier().wait()
            part.close()


def test_a_part_cannot_be_split(any_comm: Communicator) -> None:
    if any_comm.size == 1:
        pytest.skip("needs a second rank")
    part = any_comm.split(any_comm.rank)
    with pytest.raises(CommunicationError, match="with all"):
        part.split(0)
    part.close()


def test_messages_are_refused_clearly(any_comm: Communicator) -> None:
    with pytest.raises(CommunicationError, match="no messages"):
        any_comm.send(torch.ones(1), 0)
    with pytest.raises(CommunicationError, match="no messages"):
        any_comm.receive(torch.ones(1), 0)


def test_a_root_that_does_not_exist_is_refused(any_comm: Communicator) -> None:
    with pytest.raises(ValueError, match=f"rank {any_comm.size} is outside"):
        any_comm.broadcast(torch.ones(1), root=any_comm.size)


def test_a_barrier_ends_when_all_have_come(any_comm: Communicator) -> None:
    if any_comm.size == 1:
        pytest.skip("needs a second rank")
    if any_comm.rank == 0:
        work = any_comm.barrier()
        assert not work.done()
        with pytest.raises(CommunicationTimeout, match=r"barrier .*0\.1 s"):
            work.wait(timeout=0.1)
        work.wait()
    else:
        time.sleep(0.5)
        any_comm.barrier().wait()
