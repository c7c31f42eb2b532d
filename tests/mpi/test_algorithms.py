"""Every all-reduce algorithm, on every way of spreading the ranks over nodes, against closed forms."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.choice import Choice, Entry, default_choice, named_choice
from allreduce_sgd.comm.layout import Layout
from allreduce_sgd.comm.mpi import MpiCommunicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.options import ALGORITHMS
from allreduce_sgd.comm.progress import ProgressEngine
from allreduce_sgd.errors import CommunicationError, ConfigError
from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import TIMEOUT_SECONDS

CPU = torch.device("cpu")
OPS = list(ReduceOp)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
# How rank r of all is put on nodes: all on one, two at a time, by turns, all but the first together, each by itself.
SPREADS = {
    "one-node": lambda rank: 0,
    "pairs": lambda rank: rank // 2,
    "by-turns": lambda rank: rank % 2,
    "uneven": lambda rank: min(rank, 1),
    "alone": lambda rank: rank,
}


@dataclass
class Case:
    algorithm: str
    spread: str


CASES = [Case(algorithm, "one-node") for algorithm in ALGORITHMS]
CASES += [Case("two-level", spread) for spread in SPREADS if spread != "one-node"]


def communicator(
    topology: Topology, algorithm: str, spread: str, deterministic: bool = False, segment_bytes: int | None = None
) -> MpiCommunicator:
    def choice(layout: Layout) -> Choice:
        shared = layout.memory is not None
        if algorithm == "auto":
            return default_choice(layout.nodes, shared, deterministic)
        made = named_choice(algorithm, layout.nodes, shared, deterministic)
        if segment_bytes is None:
            return made
        return Choice(
            tuple(Entry(entry.limit_bytes, entry.algorithm, segment_bytes) for entry in made.messages),
            tuple(Entry(entry.limit_bytes, entry.algorithm, segment_bytes) for entry in made.between),
        )

    engine = ProgressEngine(topology.mpi_lock, oversubscribed=topology.local_size > topology.cores)
    return MpiCommunicator(topology.world, engine, choice, TIMEOUT_SECONDS, SPREADS[spread](topology.rank))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.algorithm}-{case.spread}")
def comm(request: pytest.FixtureRequest, topology: Topology) -> Iterator[MpiCommunicator]:
    # Segments as short as this are not for speed: many of them are under way at once even in the shortest buffer.
    made = communicator(topology, request.param.algorithm, request.param.spread, segment_bytes=64)
    yield made
    made.close()


@pytest.fixture(scope="module")
def allocation(comm: MpiCommunicator) -> Tensor:
    """Memory from `allocate` for the longest buffer of the widest dtype."""
    return comm.allocate(max(lengths(comm)) * 8, torch.uint8, CPU)


def lengths(comm: MpiCommunicator) -> list[int]:
    # Where every segment is a message of its own, 64 bytes each, fewer elements make hundreds of them.
    size, longest = comm.size, 2_011 if comm.algorithm in ("segmented-ring", "chain") else 10_011
    return sorted({0, 1, size - 1, size, size + 1, 2 * size + 1, longest})


def contribution(rank: int, length: int, dtype: torch.dtype, size: int) -> Tensor:
    if dtype is torch.bool:
        return (torch.arange(length) + rank) % size == 0
    return ((torch.arange(length) % 3 + 1) * (rank + 1)).to(dtype)


def expected(op: ReduceOp, length: int, dtype: torch.dtype, size: int) -> Tensor:
    base = torch.arange(length) % 3 + 1
    if dtype is torch.bool:
        either = op in (ReduceOp.SUM, ReduceOp.MAX)
        return torch.full((length,), either or size == 1, dtype=torch.bool)
    values = {
        ReduceOp.SUM: base * (size * (size + 1) // 2),
        ReduceOp.AVERAGE: base * (size + 1) / 2,
        ReduceOp.MIN: base,
        ReduceOp.MAX: base * size,
        ReduceOp.PRODUCT: base**size * math.factorial(size),
    }[op]
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_all_reduce_in_place_shared_and_private(
    comm: MpiCommunicator, allocation: Tensor, op: ReduceOp, dtype: torch.dtype
) -> None:
    if op is ReduceOp.AVERAGE and not dtype.is_floating_point:
        pytest.skip("no average of whole numbers")
    for length in lengths(comm):
        wanted = expected(op, length, dtype, comm.size)
        mine = contribution(comm.rank, length, dtype, comm.size)
        private = mine.clone()
        assert comm.all_reduce(private, op).wait().data_ptr() == private.data_ptr()
        assert torch.equal(private, wanted)
        allocated = allocation.view(dtype)[:length]
        allocated.copy_(mine)
        comm.all_reduce(allocated, op, blocking=True)
        assert torch.equal(allocated, wanted)
        allocated.copy_(mine)
        assert torch.equal(comm.all_reduce(allocated, op, shared_result=True).wait(), wanted)


@pytest.mark.parametrize(
    ("algorithm", "spread"),
    [
        ("shared-memory", "one-node"),
        ("two-level", "pairs"),
        ("two-level", "uneven"),
        ("segmented-ring", "one-node"),
        ("chain", "one-node"),
    ],
)
def test_long_buffers_in_many_pieces_and_blocks(topology: Topology, algorithm: str, spread: str) -> None:
    comm = communicator(topology, algorithm, spread)
    length = 1_500_007
    for dtype in (torch.float32, torch.bfloat16):
        mine = contribution(comm.rank, length, dtype, comm.size)
        wanted = expected(ReduceOp.SUM, length, dtype, comm.size)
        allocated = comm.allocate(length, dtype, CPU)
        allocated.copy_(mine)
        works = [comm.all_reduce(mine), comm.all_reduce(allocated)]
        for work in works:
            assert torch.equal(work.wait(), wanted)
    comm.close()


def test_a_part_of_an_allocated_buffer(comm: MpiCommunicator) -> None:
    allocated = comm.allocate(30_000, torch.float32, CPU)
    total = comm.size * (comm.size + 1) / 2
    for stop in (501, 20_001):
        allocated.fill_(comm.rank + 1)
        comm.all_reduce(allocated[17:stop]).wait()
        assert torch.equal(allocated[17:stop], torch.full((stop - 17,), total))
        assert torch.equal(allocated[:17], torch.full((17,), comm.rank + 1.0))
        assert torch.equal(allocated[stop:], torch.full((30_000 - stop,), comm.rank + 1.0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.algorithm}-{case.spread}")
def test_allocated_on_some_ranks_and_private_on_others(topology: Topology, case: Case) -> None:
    comm = communicator(topology, case.algorithm, case.spread)
    # Small in both kinds of memory, in private memory only, and in none.
    for length in (100, 20_000, 200_000):
        allocated = comm.allocate(length, torch.float32, CPU)
        buffer = allocated if comm.rank % 2 == 0 else torch.empty(length)
        for shared in (False, True):
            buffer.fill_(comm.rank + 1)
            result = comm.all_reduce(buffer, shared_result=shared).wait()
            assert torch.equal(result, torch.full((length,), comm.size * (comm.size + 1) / 2))
    comm.close()


def test_many_in_flight_in_both_kinds_of_memory(comm: MpiCommunicator) -> None:
    buffers = [comm.allocate(50 + index, torch.float32, CPU) for index in range(10)]
    buffers += [torch.empty(70 + index) for index in range(10)]
    for round_number in range(3):
        for index, buffer in enumerate(buffers):
            buffer.fill_(index + comm.rank + round_number)
        works = [comm.all_reduce(buffer, shared_result=index % 2 == 0) for index, buffer in enumerate(buffers)]
        for index in reversed(range(len(buffers))):
            total = comm.size * (index + round_number) + comm.size * (comm.size - 1) / 2
            assert torch.equal(works[index].wait(), torch.full_like(buffers[index], total))


def test_the_same_bits_on_all_ranks_and_every_time(comm: MpiCommunicator) -> None:
    generator = torch.Generator().manual_seed(comm.rank)
    start = torch.randn(9_973, generator=generator)
    allocated = comm.allocate(len(start), torch.float32, CPU)
    results = []
    for _ in range(3):
        results.append(comm.all_reduce(start.clone()).wait().view(torch.uint8).tolist())
        allocated.copy_(start)
        comm.all_reduce(allocated, shared_result=True).wait()
    assert results[0] == results[1] == results[2]
    assert all(other == results[0] for other in all_gather_object(comm, results[0]))


def test_reduce_scatter_leaves_each_rank_its_chunk(comm: MpiCommunicator, allocation: Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for length in lengths(comm):
            mine = contribution(comm.rank, length, dtype, comm.size)
            wanted = expected(ReduceOp.SUM, length, dtype, comm.size)
            own = chunk(length, comm.size, comm.rank)
            allocated = allocation.view(dtype)[:length].copy_(mine)
            for buffer in (mine, allocated):
                comm.reduce_scatter(buffer).wait()
                assert torch.equal(buffer[own], wanted[own])


def test_not_a_number_is_the_extreme_on_all_ranks(comm: MpiCommunicator) -> None:
    for op in (ReduceOp.MIN, ReduceOp.MAX):
        for rank in range(comm.size):
            buffer = torch.tensor([float("nan") if comm.rank == rank else 1.0, 2.0])
            assert comm.all_reduce(buffer, op).wait().isnan().tolist() == [True, False]


def test_bytes_are_counted(comm: MpiCommunicator) -> None:
    size, length = comm.size, 12 * comm.size
    before = comm.traffic.bytes_sent
    assert before is not None
    comm.all_reduce(torch.ones(length)).wait()
    after = comm.traffic.bytes_sent
    assert after is not None
    total = sum(all_gather_object(comm, after - before))
    if size == 1:
        assert total == 0
    else:
        # No all-reduce can do with less than 2(P-1)n in all; a two-step one never moves more than everything to all.
        assert size * 4 * length * (0.5 if comm.algorithm == "mpi" else 1) <= total <= 2 * size * size * 4 * length


@pytest.mark.parametrize("spread", SPREADS)
def test_deterministic_bits_do_not_depend_on_how_the_data_are_cut(topology: Topology, spread: str) -> None:
    comm = communicator(topology, "auto", spread, deterministic=True)
    generator = torch.Generator().manual_seed(comm.rank)
    data = torch.randn(40_009, generator=generator) * 10.0 ** torch.randint(-6, 6, (40_009,), generator=generator)
    whole = comm.all_reduce(data.clone()).wait()
    for piece_length in (1, 7, 1000, 8192, 39_999):
        cut = data.clone()[: 50 * piece_length]
        allocated = comm.allocate(len(cut), torch.float32, CPU)
        allocated.copy_(cut)
        shared = comm.allocate(len(cut), torch.float32, CPU)
        shared.copy_(cut)
        for start in range(0, len(cut), piece_length):
            piece = slice(start, start + piece_length)
            comm.all_reduce(cut[piece]).wait()
            comm.all_reduce(allocated[piece]).wait()
            result = comm.all_reduce(shared[piece], shared_result=True).wait()
            assert torch.equal(result, cut[piece])
        assert torch.equal(cut, whole[: len(cut)])
        assert torch.equal(allocated, cut)
    comm.close()


def test_bfloat16_is_accumulated_in_float32(topology: Topology) -> None:
    # One by one, 256 + 1 rounds back to 256 in bfloat16; three ones on top of it are 259, which rounds to 260.
    for algorithm, spread in (("shared-memory", "one-node"), ("two-level", "alone"), ("ring", "one-node")):
        comm = communicator(topology, algorithm, spread)
        if comm.size == 4:
            buffer = torch.full((33,), 256.0 if comm.rank == 0 else 1.0, dtype=torch.bfloat16)
            comm.all_reduce(buffer).wait()
            assert torch.equal(buffer, torch.full((33,), 260.0, dtype=torch.bfloat16))
        comm.close()


def test_ranks_that_reduce_different_things_are_told(topology: Topology) -> None:
    comm = communicator(topology, "auto", "one-node")
    if comm.size == 1:
        comm.close()
        pytest.skip("needs a second rank")
    work = comm.all_reduce(torch.ones(10 + comm.rank))
    with pytest.raises(
        CommunicationError, match=r"all_reduce no\. 1: rank 0 has 10 float32 \(sum.*rank 1 has 11 float32 \(sum"
    ):
        work.wait()
    with pytest.raises(CommunicationError, match="not started, since an earlier operation failed"):
        comm.all_reduce(torch.ones(10)).wait()
    # A communicator whose ranks disagree cannot be closed in order; the next test has one of its own.


def test_nothing_has_a_name_in_dev_shm(topology: Topology) -> None:
    before = (
        {name for name in os.listdir("/dev/shm") if not name.startswith("mpich")} if os.path.isdir("/dev/shm") else None
    )
    if before is None:
        pytest.skip("no /dev/shm here")
    comm = communicator(topology, "auto", "one-node")
    comm.allocate(100_000, torch.float32, CPU)
    names = {
        Path(line.split(maxsplit=5)[-1]).name
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "allreduce_sgd-" in line
    }
    if comm.size > 1:
        assert names
    assert not names & set(os.listdir("/dev/shm"))
    comm.close()


def test_too_much_memory_is_refused_on_all_ranks(topology: Topology) -> None:
    comm = communicator(topology, "auto", "one-node")
    if comm.size > 1:
        with pytest.raises(CommunicationError, match=r"bytes of shared memory are needed, but .* are free"):
            comm.allocate(2**50, torch.uint8, CPU)
        assert float(comm.all_reduce(comm.allocate(3, torch.float32, CPU) + 1).wait()[0]) == comm.size
    comm.close()


def test_an_algorithm_that_does_not_suit_is_refused(topology: Topology) -> None:
    if topology.size == 1:
        pytest.skip("needs a second rank")
    with pytest.raises(ConfigError, match=r"--algorithm shared-memory: the ranks are on 2 nodes"):
        communicator(topology, "shared-memory", "by-turns")


def test_parts_have_memory_of_their_own(topology: Topology) -> None:
    comm = communicator(topology, "auto", "one-node")
    part = comm.split(comm.rank % 2, key=comm.rank)
    buffers = [whole.allocate(100, torch.float32, CPU).fill_(1) for whole in (comm, part)]
    works = [comm.all_reduce(buffers[0]), part.all_reduce(buffers[1])]
    assert [float(work.wait()[0]) for work in works] == [comm.size, part.size]
    part.close()
    comm.close()
