"""Memory that the ranks of a node share: gathering out of each other's buffers, and tensors that all of them have."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.choice import default_choice
from allreduce_sgd.comm.mpi import MpiCommunicator
from allreduce_sgd.comm.progress import ProgressEngine
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import TIMEOUT_SECONDS

CPU = torch.device("cpu")
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.cfloat,
]


def made(topology: Topology, spare_cores: bool = True, node_color: int | None = None) -> MpiCommunicator:
    engine = ProgressEngine(topology.mpi_lock, topology.local_size > topology.cores, spare_cores)
    return MpiCommunicator(
        topology.world,
        engine,
        lambda layout: default_choice(layout.nodes, layout.pairs_share, False),
        TIMEOUT_SECONDS,
        node_color,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["spare cores", "no spare cores"])
def node(request: pytest.FixtureRequest, topology: Topology) -> Iterator[MpiCommunicator]:
    comm = made(topology, request.param)
    yield comm
    comm.close()


def expected(length: int, size: int, dtype: torch.dtype) -> Tensor:
    """Chunk r filled with the values of rank r."""
    whole = torch.zeros(length, dtype=dtype)
    for rank in range(size):
        piece = chunk(length, size, rank)
        whole[piece] = ((torch.arange(piece.start, piece.stop) * 7 + rank) % 2).to(dtype)
    return whole


def lengths(size: int) -> list[int]:
    # The last is longer than a slot of staging memory, in int64 and wider.
    return sorted({0, 1, size - 1, size, size + 1, 1000, 300_001 * size + 1})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["window", "private", "mixed"])
def test_all_gather_out_of_each_others_memory(node: MpiCommunicator, dtype: torch.dtype, where: str) -> None:
    for length in lengths(node.size):
        buffer = torch.zeros(length, dtype=dtype)
        window = node.allocate(length, dtype, CPU)
        if where == "window" or (where == "mixed" and node.rank % 2):
            buffer = window
        wanted = expected(length, node.size, dtype)
        for _ in range(2):
            buffer.zero_()
            own = chunk(length, node.size, node.rank)
            buffer[own] = wanted[own]
            assert node.all_gather(buffer).wait().data_ptr() == buffer.data_ptr()
            assert torch.equal(buffer, wanted)


def test_what_all_gather_reads_from_peers_is_counted(node: MpiCommunicator) -> None:
    if node.size == 1:
        pytest.skip("one rank reads nothing")
    buffer = node.allocate(1000 * node.size, torch.float32, CPU)
    before = node.traffic.bytes_sent
    node.all_gather(buffer).wait()
    assert before is not None
    assert node.traffic.bytes_sent == before + 4000 * (node.size - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_memory_is_the_same_for_all_ranks(node: MpiCommunicator, dtype: torch.dtype) -> None:
    for numel in (0, 1, node.size, 10_000):
        shared = node.allocate_shared(numel, dtype, CPU)
        assert shared is not None
        assert shared.shape == (numel,)
        assert torch.equal(shared, torch.zeros(numel, dtype=dtype))
        node.barrier().wait()
        own = chunk(numel, node.size, node.rank)
        shared[own] = node.rank + 1
        node.barrier().wait()
        for rank in range(node.size):
            assert (shared[chunk(numel, node.size, rank)] == rank + 1).all()
        node.barrier().wait()


def test_ranks_of_several_nodes_have_no_memory_in_common(topology: Topology) -> None:
    if topology.size == 1:
        pytest.skip("one rank is one node")
    comm = made(topology, node_color=topology.rank % 2)
    assert comm.allocate_shared(10, torch.float32, CPU) is None
    comm.close()


def test_one_rank_shares_memory_with_itself() -> None:
    shared = SingleCommunicator().allocate_shared(5, torch.float32, CPU)
    assert torch.equal(shared, torch.zeros(5))


def test_an_operation_that_a_rank_does_not_await_ends_all_the_same(topology: Topology) -> None:
    """Also where no core is spare, so that nobody but a rank's own calls moves things on for a while."""
    comm = made(topology, spare_cores=False)
    buffer = comm.allocate(1000, torch.float32, CPU).fill_(comm.rank + 1)
    work = comm.all_reduce(buffer)
    if comm.rank == 0:
        deadline_seconds = time.monotonic() + TIMEOUT_SECONDS
        while not work.done():
            assert time.monotonic() < deadline_seconds
            time.sleep(0.01)
    work.wait()
    assert (buffer == comm.size * (comm.size + 1) / 2).all()
    comm.close()


def test_barriers_of_the_node_hold_every_rank_back(node: Communicator) -> None:
    late = node.allocate(1, torch.float32, CPU)
    for root in range(node.size):
        node.barrier().wait()
        if node.rank == root:
            time.sleep(0.02)
            late.fill_(root + 1)
        node.barrier().wait()
        assert float(node.broadcast(late.clone(), root).wait()) == root + 1
