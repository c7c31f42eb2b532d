"""Workers of parameter servers at their own pace: Downpour, staleness, and elastic averaging."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.server.worker import Served
from tests.mpi.server_job import (
    MOMENTUM,
    PLAIN,
    Job,
    at_own_pace,
    needs,
    train,
    with_batch_norm,
)
from tests.mpi.test_strategies import assert_same, mini_batch, network, serial


@pytest.mark.parametrize("optimizer", [MOMENTUM, OptimizerOptions(lr=0.1, momentum=0.0, clip_norm=0.3)])
@pytest.mark.parametrize("name", ["server-async", "server-staleness"])
def test_one_asynchronous_worker_is_serial(comm: Communicator, name: str, optimizer: OptimizerOptions) -> None:
    if comm.size != 2:
        pytest.skip("2 ranks only")
    model = train(StrategyOptions(strategy=name), comm, optimizer, 12, 6)
    if model is not None:
        assert parameters_sha256(model) == parameters_sha256(serial(optimizer, 12, 6))


@pytest.mark.parametrize(("push", "fetch"), [(2, 2), (1, 3), (3, 3)])
def test_one_downpour_worker_follows_its_own_gradients_between_fetches(
    comm: Communicator, push: int, fetch: int
) -> None:
    if comm.size != 2:
        pytest.skip("2 ranks only")
    options = StrategyOptions(strategy="server-async", push=push, fetch=fetch)
    model = train(options, comm, PLAIN, 12, 6)
    if model is not None:
        assert_same(model, serial(PLAIN, 12, 6))


def test_downpour_pushes_sums_and_sees_old_parameters_until_it_fetches(comm: Communicator) -> None:
    """push 2, fetch 1, against a loop by hand: every second gradient is computed at the same parameters as the last."""
    if comm.size != 2:
        pytest.skip("2 ranks only")
    model = train(StrategyOptions(strategy="server-async", push=2), comm, MOMENTUM, 12, 6)
    if model is None:
        return
    expected = network()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for step in range(12):
        inputs, targets = mini_batch(step, 6)
        functional.cross_entropy(expected(inputs), targets).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, expected)


@pytest.mark.parametrize("softsync", [None, 1])
@pytest.mark.parametrize("tree", [False, True])
def test_asynchronous_workers_learn_and_count_staleness(comm: Communicator, tree: bool, softsync: int | None) -> None:
    needs(comm, 3)
    options = StrategyOptions(
        strategy="server-staleness", server_tree=comm.size - 2 if tree else None, softsync=softsync
    )
    steps, count = 60, 12
    inputs, targets = mini_batch(0, 200)

    def work(worker: Served) -> dict[str, Any]:
        before = functional.cross_entropy(worker.model(inputs), targets).item()
        for first in range(0, steps, 20):
            assert at_own_pace(worker, first, first + 20, count) == first + 20
            assert worker.pace is not None
            assert worker.pace.totals[1] == 20 * count
            with worker.consensus():
                views = all_gather_object(worker.comm, parameters_sha256(worker.model))
                assert len(set(views)) == 1
        sums = worker.measures()
        worker.finish()
        after = functional.cross_entropy(worker.model(inputs), targets).item()
        assert after != before
        return {"measures": sums, **worker.summary(), "figures": worker.figures(sums)}

    told = Job(comm, options, PLAIN, network()).run(work)
    if told is not None:
        workers = comm.size - (2 if tree else 1)
        assert sum(told["staleness"].values()) == steps * workers
        # A gradient cannot be older than what the others do in the meantime, except in turns of the scheduler.
        assert 0 <= told["mean_staleness"] < 3 * workers
        if comm.rank == 0:
            assert told["measures"]["stale_gradients"] == steps * workers
            assert told["figures"]["mean_staleness"] == pytest.approx(told["mean_staleness"])
        else:
            assert told["measures"] == {"staleness": 0.0, "stale_gradients": 0.0}


def elastic_by_hand(steps: int, period: int, alpha: float, optimizer: OptimizerOptions) -> tuple[nn.Module, nn.Module]:
    """One worker and its centre, Zhang et al. 2015, algorithm 1."""
    x, z = network(), network()
    step = torch.optim.SGD(x.parameters(), lr=optimizer.lr or 0.0, momentum=optimizer.momentum or 0.0)
    for number in range(steps):
        inputs, targets = mini_batch(number, 6)
        step.zero_grad()
        functional.cross_entropy(x(inputs), targets).backward()
        if number and number % period == 0:
            with torch.no_grad():
                for mine, centre in zip(x.parameters(), z.parameters(), strict=True):
                    pull = alpha * (mine - centre)
                    mine.sub_(pull)
                    centre.add_(pull)
        step.step()
    return x, z


@pytest.mark.parametrize("period", [1, 3])
def test_elastic_averaging_by_hand(comm: Communicator, period: int) -> None:
    if comm.size != 2:
        pytest.skip("2 ranks only")
    options = StrategyOptions(strategy="easgd", servers=1, period=period, elastic_beta=0.4)

    def work(worker: Served) -> nn.Module:
        assert worker.name == "easgd"
        at_own_pace(worker, 0, 7, 6)
        return copy.deepcopy(worker.model)

    job = Job(comm, options, MOMENTUM, network())
    own = job.run(work)
    if own is not None:
        assert job.worker is not None
        x, z = elastic_by_hand(7, period, 0.4, MOMENTUM)
        assert_same(own, x)
        assert_same(job.worker.model, z)
        assert "centre" in job.worker.consensus_kind


def test_elastic_workers_agree_on_the_centre(comm: Communicator) -> None:
    needs(comm, 3)

    def work(worker: Served) -> None:
        at_own_pace(worker, 0, 20, 12)
        with worker.consensus():
            agreed = all_gather_object(worker.comm, parameters_sha256(worker.model))
        assert len(set(agreed)) == 1
        assert agreed[0] != parameters_sha256(network())
        worker.finish()
        assert parameters_sha256(worker.model) == agreed[0]

    Job(comm, StrategyOptions(strategy="easgd", servers=comm.size - 2, period=2), MOMENTUM, network()).run(work)


def test_consensus_averages_buffers_and_leaves_no_trace(comm: Communicator) -> None:
    needs(comm, 2)
    model: Any = with_batch_norm()

    def work(worker: Served) -> str:
        assert at_own_pace(worker, 0, 4, 4 * worker.comm.size) == 4
        before = parameters_sha256(model)
        alone = all_gather_object(worker.comm, model[1].running_mean.tolist())
        with worker.consensus():
            torch.testing.assert_close(model[1].running_mean, torch.tensor(alone, dtype=torch.float64).mean(0))
            agreed = parameters_sha256(model)
            assert len(set(all_gather_object(worker.comm, agreed))) == 1
        assert parameters_sha256(model) == before
        worker.finish()
        assert parameters_sha256(model) == agreed
        return agreed

    Job(comm, StrategyOptions(strategy="server-async"), PLAIN, model).run(work)
