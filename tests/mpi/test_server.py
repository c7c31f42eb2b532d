"""Parameter servers in lockstep, and in a tree, against serial references."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.errors import ConfigError, MismatchError, NonFiniteError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.gradients.sync_batch_norm import close_sync_batchnorm, convert_sync_batchnorm
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.optim.schedule import build_schedule
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.pace import REPORTED
from allreduce_sgd.strategies.server.roles import divide
from allreduce_sgd.strategies.server.worker import Served
from tests.mpi.server_job import (
    MOMENTUM,
    PLAIN,
    Job,
    in_step,
    needs,
    sync,
    train,
    with_batch_norm,
)
from tests.mpi.test_strategies import assert_same, mini_batch, network, part_of, serial


def test_one_rank_alone_is_refused(comm: Communicator) -> None:
    if comm.size > 1:
        pytest.skip("one rank only")
    with pytest.raises(ConfigError, match="--strategy server-sync: 1 rank started"):
        divide(comm, StrategyOptions(strategy="server-sync"))


@pytest.mark.parametrize(
    "optimizer",
    [
        MOMENTUM,
        OptimizerOptions(optimizer="adamw", lr=0.01),
        OptimizerOptions(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, clip_norm=0.3),
    ],
    ids=["sgd", "adamw", "clipped"],
)
def test_sync_equals_serial(comm: Communicator, optimizer: OptimizerOptions) -> None:
    needs(comm, 2)
    expected = serial(optimizer, 20, 7)
    for servers in range(1, comm.size):
        model = train(sync(servers), comm, optimizer, 20, 7)
        if model is not None:
            assert_same(model, expected)
        if model is not None and comm.size == 2:
            assert parameters_sha256(model) == parameters_sha256(expected)


def test_over_every_back_end(any_comm: Communicator) -> None:
    needs(any_comm, 2)
    if any_comm.backend == "nccl":
        with pytest.raises(ConfigError, match="--backend nccl has no messages"):
            divide(any_comm, sync())
        return
    # One job only: a group that Gloo makes of the same ranks as one closed before finds the addresses of that one.
    model = train(sync(), any_comm, MOMENTUM, 6, 7)
    if model is not None:
        assert_same(model, serial(MOMENTUM, 6, 7))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_sync_with_unequal_and_empty_shares(comm: Communicator, count: int) -> None:
    needs(comm, 3)
    model = train(sync(), comm, MOMENTUM, 10, count)
    if model is not None:
        assert_same(model, serial(MOMENTUM, 10, count))


def test_the_servers_step_at_the_workers_learning_rate(comm: Communicator) -> None:
    needs(comm, 2)

    def work(worker: Served) -> nn.Module:
        schedule = build_schedule(MOMENTUM, worker.optimizer, 100)
        schedule.lr_lambdas = [lambda step: 1 / (1 + step)]
        for step in range(6):
            in_step(worker, step, step + 1, 7)
            schedule.step()
        return worker.model

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Job(comm, sync(comm.size - 1), MOMENTUM, network()).run(work)
    if model is not None:
        expected = network()
        optimizer = build_optimizer(MOMENTUM, expected.parameters())
        for step in range(6):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 0.1 / max(1, 1 + step)
            inputs, targets = mini_batch(step, 7)
            functional.cross_entropy(expected(inputs), targets).backward()
            optimizer.step()
        assert_same(model, expected)


def test_statistics_of_all_workers_with_unequal_shares(comm: Communicator) -> None:
    needs(comm, 3)
    role = divide(comm, sync())
    model, expected = with_batch_norm(), with_batch_norm()
    if not role.serves:
        convert_sync_batchnorm(model, role.peers)

    def work(worker: Served) -> None:
        in_step(worker, 0, 6, 7)
        optimizer = build_optimizer(MOMENTUM, expected.parameters())
        for step in range(6):
            optimizer.zero_grad()
            inputs, targets = mini_batch(step, 7)
            functional.cross_entropy(expected(inputs), targets).backward()
            optimizer.step()
        assert_same(worker.model, expected, rtol=1e-6, atol=1e-8)

    Job(comm, sync(), MOMENTUM, model, GradientOptions(sync_batch_norm=True)).run(work)
    if not role.serves:
        close_sync_batchnorm(model)
    role.peers.close()


def bags(sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(20, 4, sparse=sparse), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("strategy", ["server-sync", "server-async"])
def test_sparse_gradients_arrive_as_dense_ones(comm: Communicator, strategy: str) -> None:
    if comm.size != 2:
        pytest.skip("2 ranks only")
    words = torch.arange(60).view(10, 6) * 7 % 20

    def share_of(step: int) -> Share:
        return Share([lambda model: model(words[step : step + 2]).square().mean()], 2, 2)

    def work(worker: Served) -> None:
        if worker.pace is not None:
            worker.pace.open(0, 6)
        for step in range(6):
            if worker.pace is not None:
                assert worker.pace.take([0.0] * REPORTED) == (step, 0)
            worker.step(share_of(step))
        if worker.pace is not None:
            assert worker.pace.take([0.0] * REPORTED) is None
            assert worker.pace.close() == 6
        worker.finish()
        expected = bags(sparse=False)
        optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
        for step in range(6):
            optimizer.zero_grad()
            share_of(step).losses[0](expected).backward()
            nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            optimizer.step()
        assert_same(worker.model, expected)

    optimizer = OptimizerOptions(lr=0.1, momentum=0.0, clip_norm=0.5)
    options = StrategyOptions(strategy=strategy, push=1, fetch=1)
    Job(comm, options, optimizer, bags(sparse=True)).run(work)


def test_servers_and_workers_must_have_the_same_model(comm: Communicator) -> None:
    needs(comm, 2)
    model = nn.Linear(5, 3 if comm.rank < comm.size - 1 else 4)
    with pytest.raises(MismatchError, match="the model differs between ranks"):
        Job(comm, sync(), PLAIN, model)


def test_optimizers_of_whole_matrices_on_one_server(comm: Communicator) -> None:
    needs(comm, 2)
    optimizer = OptimizerOptions(optimizer="adafactor", lr=0.01)
    model = train(sync(), comm, optimizer, 10, 6)
    if model is not None:
        assert_same(model, serial(optimizer, 10, 6), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", [MOMENTUM, OptimizerOptions(lr=0.1, clip_norm=0.3)], ids=["sgd", "clipped"])
def test_sync_with_a_tree_equals_serial(comm: Communicator, optimizer: OptimizerOptions) -> None:
    needs(comm, 3)
    options = StrategyOptions(strategy="server-sync", server_tree=comm.size - 2)
    for count in (1, 7):
        model = train(options, comm, optimizer, 12, count)
        if model is not None:
            assert_same(model, serial(optimizer, 12, count))


def test_the_initial_parameters_are_those_of_the_first_worker(comm: Communicator) -> None:
    needs(comm, 2)
    model = network()
    expected = copy.deepcopy(model)
    if comm.rank > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(comm.rank)

    def work(worker: Served) -> None:
        with worker.consensus():
            assert_same(worker.model, expected, rtol=0, atol=0)
        assert parameters_sha256(worker.model) == parameters_sha256(expected)

    for options in (sync(comm.size - 1), StrategyOptions(strategy="easgd", servers=1)):
        Job(comm, options, PLAIN, copy.deepcopy(model)).run(work)


def test_an_overflow_of_one_worker_skips_the_step_of_all(comm: Communicator) -> None:
    needs(comm, 2)

    def work(worker: Served) -> None:
        in_step(worker, 0, 1, 6)
        before = parameters_sha256(worker.model)
        share = part_of(mini_batch(1, 6), worker.comm.rank, worker.comm.size)
        last = worker.comm.rank == worker.comm.size - 1
        compute = share.losses[0]
        huge = Share([lambda model: compute(model) * float("inf")], share.samples, share.global_samples)
        worker.step(huge if last else share)
        assert parameters_sha256(worker.model) == before
        assert worker.scaling is not None
        assert worker.scaling.skipped_steps == int(last)
        in_step(worker, 2, 3, 6)
        assert parameters_sha256(worker.model) != before

    Job(comm, sync(), MOMENTUM, network(), precision="fp16").run(work)


def test_a_gradient_that_is_not_finite_is_told(comm: Communicator) -> None:
    needs(comm, 2)

    def work(worker: Served) -> None:
        bad = Share([lambda model: model(torch.full((1, 5), float("nan"), dtype=torch.float64)).sum()], 1, 1)
        with pytest.raises(NonFiniteError, match=f"NaN or Inf in the loss, .* of rank {worker.comm.rank}"):
            worker.step(bad)

    Job(comm, sync(), PLAIN, network(), GradientOptions(check_finite=True)).run(work)
