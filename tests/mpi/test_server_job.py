"""Jobs with parameter servers: going on from checkpoints, bytes by role, compression, and deadlines."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import CommunicationTimeout
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.server.worker import Served
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import connected
from tests.mpi.server_job import MOMENTUM, PLAIN, Job, at_own_pace, in_step, needs, resume, state_of, sync
from tests.mpi.test_strategies import assert_same, network, serial


def served_options(comm: Communicator) -> list[StrategyOptions]:
    found = [sync(comm.size - 1), sync(1)]
    if comm.size > 2:
        found.append(StrategyOptions(strategy="server-sync", server_tree=comm.size - 2))
    if comm.size == 2:
        # Of one worker these are deterministic too; the period and the sums are under way when it is saved.
        found += [
            StrategyOptions(strategy="easgd", servers=1, period=3),
            StrategyOptions(strategy="server-async", push=3, fetch=2),
            StrategyOptions(strategy="server-staleness"),
        ]
    return found


def test_a_job_goes_on_from_its_states_bit_for_bit(comm: Communicator) -> None:
    needs(comm, 2)
    for options in served_options(comm):
        train_steps = at_own_pace if options.asynchronous else in_step
        states: dict[str, Any] = {}

        def whole(worker: Served, train_steps: Any = train_steps, states: dict[str, Any] = states) -> nn.Module:
            train_steps(worker, 0, 4, 12)
            states.update(state_of(worker))
            worker.before_checkpoint(4)
            train_steps(worker, 4, 8, 12)
            return worker.model

        def rest(worker: Served, train_steps: Any = train_steps, states: dict[str, Any] = states) -> nn.Module:
            resume(worker, states)
            train_steps(worker, 4, 8, 12)
            return worker.model

        first = Job(comm, options, MOMENTUM, network())
        expected = first.run(whole)
        second = Job(comm, options, MOMENTUM, network())
        if second.server is not None:
            second.server.load_state_dict(first.saved[4])
        resumed = second.run(rest)
        if expected is not None:
            assert parameters_sha256(resumed) == parameters_sha256(expected)


def test_restart_with_other_servers_goes_on_from_the_consensus(comm: Communicator) -> None:
    needs(comm, 3)
    states: dict[str, Any] = {}

    def begin(worker: Served) -> None:
        in_step(worker, 0, 4, 6)
        states.update(state_of(worker))

    def go_on(worker: Served) -> nn.Module:
        # Only the shared part of a checkpoint is there on all of the new workers.
        worker.model.load_state_dict(model)
        worker.restart(0)
        in_step(worker, 4, 8, 6)
        return worker.model

    Job(comm, sync(1), PLAIN, network()).run(begin)
    shared = [None] if comm.rank else [{name: value.tolist() for name, value in states["model"].items()}]
    values = all_gather_object(comm, shared)[0][0]
    model = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    resumed = Job(comm, sync(2), PLAIN, network()).run(go_on)
    if resumed is not None:
        assert_same(resumed, serial(PLAIN, 8, 6))


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3000), nn.Tanh(), nn.Linear(3000, 3)).double()


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_bytes_by_role(comm: Communicator, compression: str) -> None:
    """A worker moves 2n a step and a server 2pn/S, within 5 %; with bf16 a push has a quarter of float64's bytes."""
    needs(comm, 2)
    steps, servers = 10, max(1, comm.size - 2)
    workers = comm.size - servers
    n_bytes = sum(parameter.nbytes for parameter in wide().parameters())
    push_bytes = n_bytes if compression == "none" else n_bytes // 4
    for name in ("server-sync", "server-async"):
        run = in_step if name == "server-sync" else at_own_pace

        def work(worker: Served, run: Any = run) -> dict[str, Any]:
            with worker.consensus():
                pass
            worker.before_checkpoint(0)
            # Not before the servers have counted.
            with worker.consensus():
                pass
            before, among_workers = comm.traffic.bytes_sent or 0, worker.comm.traffic.bytes_sent or 0
            run(worker, 0, steps, 3 * worker.comm.size)
            sent = (comm.traffic.bytes_sent or 0) - before
            # No all-reduce: at most the barriers of a stretch.
            assert (worker.comm.traffic.bytes_sent or 0) - among_workers <= (0 if run is in_step else 500)
            worker.before_checkpoint(1)
            worker.finish()
            return {"sent": sent, **worker.summary()}

        job = Job(
            comm,
            StrategyOptions(strategy=name, servers=servers),
            PLAIN,
            wide(),
            compression=CompressionOptions(compression=compression),
        )
        told = job.run(work)
        if told is None:
            # Of one evaluation too: a fetch of each worker.
            sent = job.sent_bytes[1] - job.sent_bytes[0]
            assert sent == pytest.approx(workers * (steps + 1) * n_bytes / servers, rel=0.05)
        else:
            assert told["worker_bytes"] == pytest.approx(steps * (push_bytes + n_bytes), rel=0.05)
            expected = [steps * workers * (push_bytes + n_bytes) / servers] * servers
            assert told["server_bytes"] == pytest.approx(expected, rel=0.05)
        # At its own pace a worker may take more steps than its share, but all take them together.
        sents = [one for one in all_gather_object(comm, None if told is None else told["sent"]) if one is not None]
        assert sum(sents) == pytest.approx(workers * steps * push_bytes, rel=0.05)


@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 1e-2), ("fp16", 2e-3), ("int8", 5e-2), ("sign", 2.0)])
def test_compressed_pushes_train_as_whole_ones_do(comm: Communicator, name: str, tolerance: float) -> None:
    needs(comm, 2)
    compression = CompressionOptions(compression=name, error_feedback=True)

    def work(worker: Served) -> nn.Module:
        in_step(worker, 0, 15, 12)
        return worker.model

    options = sync(comm.size // 2)
    model = Job(comm, options, PLAIN, network(), compression=compression, seed=3).run(work)
    if model is not None:
        expected = serial(PLAIN, 15, 12)
        moved = [torch.dist(one, two) for one, two in zip(network().parameters(), expected.parameters(), strict=True)]
        off = [torch.dist(one, two) for one, two in zip(model.parameters(), expected.parameters(), strict=True)]
        assert 0 < max(off) < tolerance * max(moved)


@pytest.mark.parametrize("strategy", ["server-sync", "server-async"])
def test_a_silent_worker_is_named_at_the_deadline(topology: Topology, strategy: str) -> None:
    if topology.size != 3:
        pytest.skip("3 ranks only")
    comm = connected(topology, "mpi")
    job = Job(comm, StrategyOptions(strategy=strategy), PLAIN, network())

    def work(worker: Served) -> None:
        if comm.rank == 0:
            in_step(worker, 0, 1, 6) if worker.pace is None else at_own_pace(worker, 0, 3, 6)
        if worker.pace is not None:
            worker.pace.open(0, 3)
            worker.pace.take([0.0] * 5)
        time.sleep(4)
        raise CommunicationTimeout("it woke up too late")

    comm.timeout_seconds = job.role.peers.timeout_seconds = 1.0
    told = r"rank 2, which serves parameters, had no message for 0\.9 s: it waits for" if comm.rank == 2 else "late"
    with pytest.raises(CommunicationTimeout, match=told) as late:
        job.run(work)
    if comm.rank == 2:
        assert "1, stuck" in str(late.value)
    time.sleep(1)
    comm.abandon()  # type: ignore[attr-defined]
    job.role.peers.abandon()  # type: ignore[attr-defined]
    topology.agree(lambda: None)
