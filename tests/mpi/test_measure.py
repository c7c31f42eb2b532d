"""What messages cost is measured once per set of hosts, kept in a file, and makes the same table on all ranks."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allreduce_sgd.comm.choice import Choice
from allreduce_sgd.comm.measure import Costs, choose, costs_of
from allreduce_sgd.comm.mpi import MpiCommunicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.topology import Topology
from tests.mpi.test_algorithms import communicator

FAST = LinkCost(1e-6, 1e-10, 1e-10)
SLOW = LinkCost(50e-6, 8e-9, 1e-10)
MIB = 1 << 20


@pytest.fixture(scope="module", params=["one-node", "by-turns", "uneven"])
def spread_comm(request: pytest.FixtureRequest, topology: Topology) -> Iterator[MpiCommunicator]:
    made = communicator(topology, "auto", request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def one_node(topology: Topology) -> Iterator[MpiCommunicator]:
    made = communicator(topology, "auto", "one-node")
    yield made
    made.close()


@pytest.fixture
def cache(topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder that all ranks are told to keep the figures in: rank 0's, the only one who does."""
    folder = Path(topology.broadcast(str(tmp_path)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "allreduce_sgd"


def files(comm: MpiCommunicator, cache: Path) -> list[Path]:
    """Return what rank 0 has written, which it does while the others go on. All ranks must call."""
    comm.barrier().wait()
    return sorted(cache.iterdir())


def read(comm: MpiCommunicator, cache: Path) -> Any:
    """Return what the only file holds. All ranks must call."""
    (file,) = files(comm, cache)
    return json.loads(file.read_text())


def rewrite(comm: MpiCommunicator, cache: Path, change: Callable[[str], str]) -> None:
    """Have rank 0 change the text of the only file. All ranks must call."""
    (file,) = files(comm, cache)
    if comm.rank == 0:
        file.write_text(change(file.read_text()))
    comm.barrier().wait()


def same_on_all(comm: MpiCommunicator, value: Any) -> bool:
    everyone = all_gather_object(comm, value)
    return all(other == everyone[0] for other in everyone)


def test_costs_are_the_same_on_all_ranks_and_make_the_same_table(spread_comm: MpiCommunicator, cache: Path) -> None:
    comm, layout = spread_comm, spread_comm.layout
    before = comm.choice
    started_seconds = time.monotonic()
    costs = costs_of(comm)
    # Under a second by itself; several ranks on each core, beside other tests, need longer.
    assert time.monotonic() - started_seconds < 30
    assert comm.choice == before
    assert same_on_all(comm, dataclasses.asdict(costs))
    assert (costs.inside is not None) == (comm.size > layout.nodes)
    assert (costs.between is not None) == (layout.nodes > 1)
    for link in (costs.inside, costs.between):
        if link is not None:
            assert 0 < link.alpha_seconds < 1
            assert 0 <= link.beta_seconds_per_byte < 1e-4
            assert 0 < link.gamma_seconds_per_byte < 1e-6
            assert f"{1e6 * link.alpha_seconds:.1f}" in costs.describe()
    assert f"{costs.library_up_to_bytes:,} bytes" in costs.describe()

    choice = choose(comm, costs)
    assert same_on_all(comm, choice.to_lists())
    assert choice.suits(layout.nodes, layout.memory is not None)
    assert Choice.from_lists(choice.to_lists()) == choice
    # It is of use at every size, on both sides of every limit.
    comm.choice = choice
    limits = [entry.limit_bytes for entry in (*choice.messages, *choice.between) if entry.limit_bytes is not None]
    for n_bytes in sorted({4, MIB, *(limit for limit in limits if limit <= MIB)}):
        for length in (n_bytes // 4, n_bytes // 4 + 1):
            buffer = torch.full((length,), comm.rank + 1.0)
            comm.all_reduce(buffer).wait()
            assert torch.equal(buffer, torch.full((length,), comm.size * (comm.size + 1) / 2))
    comm.choice = before


def test_measured_once_for_every_spread_and_anew_where_the_file_is_damaged(
    topology: Topology, one_node: MpiCommunicator, cache: Path
) -> None:
    costs = costs_of(one_node)
    assert read(one_node, cache) == dataclasses.asdict(costs)
    # Figures that nobody would measure here, so that who measured again would return others.
    changes = {"inside": dataclasses.asdict(SLOW), "barrier_seconds": 0.125, "library_up_to_bytes": 12_345}
    rewrite(one_node, cache, lambda text: json.dumps({**json.loads(text), **changes}))
    wanted = dataclasses.replace(costs, inside=SLOW, barrier_seconds=0.125, library_up_to_bytes=12_345)
    assert costs_of(one_node) == wanted
    rewrite(one_node, cache, lambda text: text[: len(text) // 2])
    again = costs_of(one_node)
    assert again.barrier_seconds < 0.125
    assert same_on_all(one_node, dataclasses.asdict(again))
    assert read(one_node, cache) == dataclasses.asdict(again)
    if topology.size > 1:
        other = communicator(topology, "auto", "alone")
        assert costs_of(other).inside is None
        assert len(files(other, cache)) == 2
        other.close()


def test_every_other_damage_is_found(topology: Topology, one_node: MpiCommunicator, cache: Path) -> None:
    if topology.size > 1:
        pytest.skip("one rank is enough, and measures fastest")
    costs_of(one_node)
    (file,) = files(one_node, cache)
    known = json.loads(file.read_text())
    link = {"alpha_seconds": 1e-6, "beta_seconds_per_byte": 1e-9, "gamma_seconds_per_byte": 1e-10}
    for damaged in (
        b"",
        b"\0" * 300,
        b"\xff\xfe{}",
        b"[]",
        b"7",
        json.dumps({name: value for name, value in known.items() if name != "barrier_seconds"}).encode(),
        json.dumps({**known, "inside": {**link, "alpha_seconds": -1}}).encode(),
        json.dumps({**known, "inside": {**link, "beta_seconds_per_byte": float("nan")}}).encode(),
        json.dumps({**known, "inside": {"alpha_seconds": 1e-6}}).encode(),
        json.dumps({**known, "inside": {**link, "delta": 0}}).encode(),
        json.dumps({**known, "library_up_to_bytes": None}).encode(),
    ):
        file.write_bytes(damaged)
        costs = costs_of(one_node)
        assert json.loads(file.read_text()) == dataclasses.asdict(costs), damaged


def test_a_folder_that_cannot_be_written_to_does_no_harm(
    topology: Topology, one_node: MpiCommunicator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not even root can make a folder below a file.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", topology.broadcast(str(tmp_path / "file")))
    costs = costs_of(one_node)
    assert same_on_all(one_node, dataclasses.asdict(costs))


def test_what_is_chosen_for_known_costs(spread_comm: MpiCommunicator) -> None:
    comm, layout = spread_comm, spread_comm.layout
    if comm.size == 1 or layout.memory is None:
        pytest.skip("needs a second rank, and shared memory")
    inside = FAST if comm.size > layout.nodes else None
    between = SLOW if layout.nodes > 1 else None
    cheap_memory = Costs(inside, between, 1e-6, 1e-10, library_up_to_bytes=0)
    for library_bytes in (0, 4096):
        costs = dataclasses.replace(cheap_memory, library_up_to_bytes=library_bytes)
        choice = choose(comm, costs)
        if library_bytes:
            assert choice.for_message(4096).algorithm == "mpi"
        assert choice.for_message(4097).algorithm != "mpi"
        if layout.nodes == 1:
            assert choice.name == choice.for_message(4097).algorithm == "shared-memory"
    if layout.nodes == 1:
        return
    across = choose(comm, cheap_memory).between
    # Over few nodes with dear messages: as few of them as there can be, then as few bytes.
    assert across[0].algorithm in ("recursive-doubling", "halving-doubling", "tree")
    if comm.size > layout.nodes:
        assert choose(comm, cheap_memory).name == "two-level"
        # Where memory is dearer than the network, messages go straight to their ranks.
        dear_memory = dataclasses.replace(cheap_memory, memory_seconds_per_byte=1.0)
        assert choose(comm, dear_memory).for_message(32 * 1024).algorithm not in ("two-level", "shared-memory")
