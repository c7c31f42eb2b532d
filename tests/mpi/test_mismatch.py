"""Ranks that launch different things are named, with all views, instead of waiting for one another to the deadline."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from allreduce_sgd.comm import desync
from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.choice import Choice, default_choice, named_choice
from allreduce_sgd.comm.layout import Layout
from allreduce_sgd.comm.mpi import MpiCommunicator
from allreduce_sgd.comm.progress import ProgressEngine
from allreduce_sgd.errors import CommunicationError, CommunicationTimeout, MismatchError
from allreduce_sgd.schedules import ring
from allreduce_sgd.schedules.step import Step
from allreduce_sgd.topology import Topology

CPU = torch.device("cpu")
# Long: none of the mismatches may need it.
DEADLINE_SECONDS = 30.0
FOUND_SECONDS = 15.0
# Shorter than in use, so that the tests are.
STALL_SECONDS = 0.2
ATTEMPTS = 5
# What texts say where a busy machine kept a rank from telling in time what it has launched.
INCOMPLETE = ("not come to it", "not answered", "long ago")
# How ranks are put on nodes.
SPREADS: dict[str, Callable[[int], int]] = {
    "one-node": lambda rank: 0,
    "by-turns": lambda rank: rank % 2,
    "uneven": lambda rank: min(rank, 1),
    "alone": lambda rank: rank,
}
ALGORITHMS = [
    ("ring", "one-node"),
    ("shared-memory", "one-node"),
    ("two-level", "by-turns"),
    ("two-level", "uneven"),
    ("recursive-doubling", "one-node"),
]

Action = Callable[[MpiCommunicator], object]


@pytest.fixture(autouse=True)
def needs_peers(topology: Topology) -> None:
    if topology.size == 1:
        pytest.skip("needs a second rank")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desync, "_STALL_SECONDS", STALL_SECONDS)


def open_communicator(
    topology: Topology, algorithm: str, spread: str = "one-node", timeout_seconds: float = DEADLINE_SECONDS
) -> MpiCommunicator:
    def choice(layout: Layout) -> Choice:
        if algorithm == "auto":
            return default_choice(layout.nodes, layout.pairs_share, False)
        return named_choice(algorithm, layout.nodes, True, False)

    engine = ProgressEngine(
        topology.mpi_lock, topology.local_size > topology.cores, topology.local_size < topology.cores
    )
    return MpiCommunicator(topology.world, engine, choice, timeout_seconds, SPREADS[spread](topology.rank))


@contextlib.contextmanager
def communicator(
    topology: Topology, algorithm: str, spread: str = "one-node", timeout_seconds: float = DEADLINE_SECONDS
) -> Iterator[MpiCommunicator]:
    """Make a communicator that the ranks leave one by one, without closing it together."""
    comm = open_communicator(topology, algorithm, spread, timeout_seconds)
    yield comm
    # Whoever leaves answers no more.
    topology.gather_all(None)
    comm.abandon()
    comm.abandon()
    with pytest.raises(CommunicationError, match="closed"):
        comm.barrier()


def all_reduce(numel: int = 1000, dtype: torch.dtype = torch.float32, op: ReduceOp = ReduceOp.SUM) -> Action:
    return lambda comm: comm.all_reduce(torch.ones(numel, dtype=dtype), op).wait()


def broadcast(numel: int = 1000, root: int = 0) -> Action:
    return lambda comm: comm.broadcast(torch.ones(numel), root).wait()


def in_order(*numels: int) -> Action:
    def launch(comm: MpiCommunicator) -> None:
        works = [comm.all_reduce(torch.ones(numel)) for numel in numels]
        for work in works:
            work.wait()

    return launch


def barrier(comm: MpiCommunicator) -> None:
    comm.barrier().wait()


def all_gather(comm: MpiCommunicator) -> None:
    comm.all_gather(torch.ones(1000)).wait()


def reduce_scatter(comm: MpiCommunicator) -> None:
    comm.reduce_scatter(torch.ones(1000)).wait()


def allocate(numel: int) -> Action:
    return lambda comm: comm.allocate(numel, torch.float32, CPU)


def split(comm: MpiCommunicator) -> None:
    comm.split(0)


# What all ranks but the last do, what the last does, and what is said of each; {how} is the algorithm.
CASES: dict[str, tuple[Action, Action, str, str, str]] = {
    "numel": (all_reduce(), all_reduce(2000), "all_reduce", "1000 float32 (sum, {how})", "2000 float32 (sum, {how})"),
    "nothing": (all_reduce(), all_reduce(0), "all_reduce", "1000 float32 (sum, {how})", "0 float32 (sum, {how})"),
    "dtype": (
        all_reduce(),
        all_reduce(dtype=torch.int32),
        "all_reduce",
        "1000 float32 (sum, {how})",
        "1000 int32 (sum, {how})",
    ),
    "op": (
        all_reduce(op=ReduceOp.SUM),
        all_reduce(op=ReduceOp.PRODUCT),
        "all_reduce",
        "1000 float32 (sum, {how})",
        "1000 float32 (product, {how})",
    ),
    "order": (
        in_order(10, 30_000, 20),
        in_order(10, 20, 30_000),
        "all_reduce",
        "30000 float32 (sum, {how})",
        "20 float32 (sum, {how})",
    ),
    "operation": (
        all_reduce(),
        reduce_scatter,
        "collective",
        "all_reduce of 1000 float32 (sum, {how})",
        "reduce_scatter of 1000 float32 (sum)",
    ),
    "gather": (
        all_gather,
        all_reduce(),
        "collective",
        "all_gather of 1000 float32",
        "all_reduce of 1000 float32 (sum, {how})",
    ),
    "barrier": (barrier, all_reduce(), "collective", "barrier", "all_reduce of 1000 float32 (sum, {how})"),
    "no barrier": (all_reduce(), barrier, "collective", "all_reduce of 1000 float32 (sum, {how})", "barrier"),
    "broadcast": (
        broadcast(),
        all_reduce(),
        "collective",
        "broadcast of 1000 float32 (from rank 0)",
        "all_reduce of 1000 float32 (sum, {how})",
    ),
    "root": (
        broadcast(root=0),
        broadcast(root=1),
        "broadcast",
        "1000 float32 (from rank 0)",
        "1000 float32 (from rank 1)",
    ),
    "long": (broadcast(10), broadcast(11), "broadcast", "10 float32 (from rank 0)", "11 float32 (from rank 0)"),
    "allocate": (allocate(10), allocate(10_000), "allocate", "10 float32", "10000 float32"),
    "close": (
        all_reduce(),
        lambda comm: comm.close(),
        "collective",
        "all_reduce of 1000 float32 (sum, {how})",
        "close",
    ),
    "split": (split, all_reduce(), "collective", "split", "all_reduce of 1000 float32 (sum, {how})"),
}


def group(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    return f"ranks {', '.join(map(str, ranks))} have"


def run_to_the_mismatch(comm: MpiCommunicator, action: Action) -> str:
    """Run what is expected to fail, or to leave the failure to the barrier after it; return the error's text."""

    def both() -> None:
        action(comm)
        barrier(comm)

    started_seconds = time.monotonic()
    with pytest.raises(MismatchError) as caught:
        both()
    assert time.monotonic() - started_seconds < FOUND_SECONDS
    return str(caught.value)


def with_all_views(topology: Topology, attempt: Callable[[], str]) -> str:
    """What `attempt` returns, once no rank was so late in it that others could not wait for what it had to tell.

    Two ranks that differ are proof, so one that a busy machine held up is told as not having come.
    """
    for _ in range(ATTEMPTS):
        text = attempt()
        if not any(topology.gather_all(any(part in text for part in INCOMPLETE))):
            break
    return text


RUNS = [(*ALGORITHMS[0], case) for case in CASES]
# How the others carry collectives differs; what the ranks then ask each other does not.
RUNS += [
    (algorithm, spread, case)
    for algorithm, spread in ALGORITHMS[1:3]
    for case in ("numel", "op", "order", "operation", "gather", "no barrier", "broadcast", "close")
]
RUNS += [(algorithm, spread, case) for algorithm, spread in ALGORITHMS[3:] for case in ("numel", "order", "broadcast")]


@pytest.mark.parametrize(("algorithm", "spread", "case"), RUNS)
def test_all_ranks_name_what_each_has_launched(topology: Topology, algorithm: str, spread: str, case: str) -> None:
    usual, deviant, name, usually, otherwise = CASES[case]
    number, last = 3 if case == "order" else 2, topology.size - 1
    others = f"{group(list(range(last)))} {usually.format(how=algorithm)}"
    told = f"{name} no. {number}: {others}, {group([last])} {otherwise.format(how=algorithm)}"

    def attempt() -> str:
        with communicator(topology, algorithm, spread) as comm:
            all_reduce(7)(comm)
            text = run_to_the_mismatch(comm, deviant if comm.rank == last else usual)
            with pytest.raises(MismatchError, match=r"not started, since an earlier operation failed"):
                comm.all_reduce(torch.ones(10)).wait()
            return text

    assert told in with_all_views(topology, attempt)


@pytest.mark.parametrize("late_seconds", [0.25, 0.35, 0.45])
def test_what_a_rank_said_before_it_came_is_no_answer_to_what_is_asked_after(
    topology: Topology, late_seconds: float
) -> None:
    last = topology.size - 1
    with communicator(topology, "shared-memory") as comm:
        all_reduce(7)(comm)
        if comm.rank == last:
            # The others have asked it by then, and its answer is on its way.
            time.sleep(late_seconds)
        text = run_to_the_mismatch(comm, all_reduce(2000) if comm.rank == last else all_reduce())
        assert f"rank {last} has 2000 float32" in text


@pytest.mark.parametrize("case", ["numel", "dtype", "op", "barrier"])
def test_ranks_of_one_node_compare_before_mpi_is_given_anything(topology: Topology, case: str) -> None:
    usual, deviant, _, usually, otherwise = CASES[case]
    last = topology.size - 1

    def attempt() -> str:
        with communicator(topology, "mpi") as comm:
            all_reduce(7)(comm)
            if comm.rank == last:
                # With ranks that come at the same moment it may be too late.
                time.sleep(0.05)
            return run_to_the_mismatch(comm, deviant if comm.rank == last else usual)

    text = with_all_views(topology, attempt)
    assert f"no. 2: {group(list(range(last)))} {usually.format(how='mpi')}" in text
    assert f"{group([last])} {otherwise.format(how='mpi')}" in text


@pytest.mark.parametrize("later", [0, 100])
def test_between_nodes_what_mpi_mixed_up_is_named_afterwards(topology: Topology, later: int) -> None:
    last = topology.size - 1

    def attempt() -> str:
        with communicator(topology, "mpi", "alone") as comm:
            # As many bytes as the others', so that MPI notices nothing and the result is wrong.
            all_reduce(dtype=torch.int32 if comm.rank == last else torch.float32)(comm)
            for _ in range(later):
                all_reduce()(comm)
            return run_to_the_mismatch(comm, barrier)

    text = with_all_views(topology, attempt)
    assert f"all_reduce no. 1: {group(list(range(last)))} 1000 float32 (sum, mpi)" in text
    assert f"{group([last])} 1000 int32 (sum, mpi)" in text


@pytest.mark.parametrize(("algorithm", "spread"), [*ALGORITHMS[:3], ("mpi", "one-node")])
def test_a_rank_that_does_not_come_is_named_at_the_deadline(topology: Topology, algorithm: str, spread: str) -> None:
    last = topology.size - 1

    def attempt() -> str:
        with communicator(topology, algorithm, spread, timeout_seconds=1.5) as comm:
            all_reduce(7)(comm)
            if comm.rank == last:
                # Its main thread sleeps; its progress thread answers.
                time.sleep(2.0)
                return ""
            with pytest.raises(CommunicationTimeout) as caught:
                all_reduce()(comm)
            return str(caught.value)

    text = with_all_views(topology, attempt)
    if topology.rank != last:
        name = f"all_reduce of 1000 float32 (no. 2, rank {topology.rank} of {topology.size})"
        told = f"rank {last} has not started it: its last was all_reduce no. 1 of 7 float32 (sum, {algorithm})"
        come = f"{group(list(range(last)))} come to it"
        assert text == f"{name}: not finished after 1.5 s; {told}; {come}"


@pytest.mark.parametrize(("algorithm", "spread"), ALGORITHMS[:3])
def test_a_rank_that_is_late_is_waited_for(topology: Topology, algorithm: str, spread: str) -> None:
    comm = open_communicator(topology, algorithm, spread)
    part = comm.split(0)
    for each in (comm, part):
        if comm.rank == comm.size - 1:
            time.sleep(3 * STALL_SECONDS)
        buffer = torch.ones(1000)
        assert each.all_reduce(buffer).wait()[-1] == comm.size
    # What they asked and answered meanwhile must not be left when the communicators are freed.
    part.close()
    if comm.rank == 0:
        time.sleep(3 * STALL_SECONDS)
    comm.close()


def test_it_is_found_also_while_nobody_waits(topology: Topology) -> None:
    def attempt() -> str:
        with communicator(topology, "ring") as comm:
            work = comm.all_reduce(torch.ones(10 + comm.rank))
            deadline_seconds = time.monotonic() + FOUND_SECONDS
            while not work.done():
                assert time.monotonic() < deadline_seconds
                time.sleep(0.01)
            with pytest.raises(MismatchError) as caught:
                work.wait()
            return str(caught.value)

    assert re.search(r"rank 0 has 10 float32 .*rank 1 has 11 float32", with_all_views(topology, attempt))


def test_a_rank_that_failed_by_itself_is_named(topology: Topology) -> None:
    with communicator(topology, "ring") as comm:
        last = comm.size - 1

        def broken(rank: int, size: int, length: int) -> Iterator[Step]:
            if rank == last:
                raise LookupError("no more steps")
            return ring.all_gather(rank, size, length)

        started_seconds = time.monotonic()
        with pytest.raises(
            CommunicationError, match=f"{'' if comm.rank == last else f'rank {last} has failed: .*'}no more steps"
        ):
            comm.run(torch.ones(100), broken).wait()
        assert time.monotonic() - started_seconds < FOUND_SECONDS


def test_what_is_under_way_elsewhere_is_named(topology: Topology) -> None:
    def attempt() -> str:
        with communicator(topology, "ring", timeout_seconds=2.0) as comm:
            part = comm.split(0)
            # Each waits for the other in another communicator: no mismatch in either, and a standstill.
            first = comm if comm.rank == 0 else part
            with pytest.raises(CommunicationTimeout) as caught:
                first.all_reduce(torch.ones(5)).wait()
            topology.gather_all(None)
            part.abandon()
            return str(caught.value)

    peer, number = (1, 1) if topology.rank == 0 else (0, 2)
    there = f"under way there: all_reduce of 5 float32 (no. {number}, rank {peer} of {topology.size})"
    last = "its last was split no. 1" if topology.rank == 0 else "it has started nothing"
    assert f"rank {peer} has not started it: {last} ({there})" in with_all_views(topology, attempt)


def test_other_communicators_go_on(topology: Topology) -> None:
    comm = open_communicator(topology, "auto")
    part, other = comm.split(0), comm.split(0)
    with pytest.raises(MismatchError):
        part.all_reduce(torch.ones(10 + part.rank)).wait()
    assert comm.all_reduce(torch.ones(10)).wait()[0] == comm.size
    part.abandon()
    assert other.all_reduce(torch.ones(10)).wait()[0] == comm.size
    other.close()
    comm.close()
