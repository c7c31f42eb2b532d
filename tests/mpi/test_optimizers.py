"""Optimizers of ours on several ranks: Nesterov's point ahead, evaluated, sharded and saved, and Newton's Hessian."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.newton import hessian_of
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.base import Strategy
from allreduce_sgd.strategies.local import Local
from allreduce_sgd.strategies.options import StrategyOptions
from tests.mpi.anchoring import World, anchored, average, replace, simulate
from tests.mpi.test_strategies import assert_same, mini_batch, network, part_of, strategy_on, train

NESTEROV = OptimizerOptions(optimizer="nesterov", lr=0.1, momentum=0.8)
SHARDED = GradientOptions(shard_optimizer=True)
WHOLE = GradientOptions(shard_optimizer=False)
SYNC, VIRTUAL, DELAYED = (
    StrategyOptions(),
    StrategyOptions(virtual_ranks=12),
    StrategyOptions(strategy="delayed", delay=1),
)
COUNT = 12


def point(model: nn.Module) -> list[Tensor]:
    return [one.detach().clone() for one in model.parameters()]


def textbook(steps: int, count: int, momentum: float = 0.8, rate: float = 0.1) -> list[Tensor]:
    """The formula itself, whose gradient is taken ahead; without any of our code."""
    model = network()
    w = before = point(model)
    for step in range(steps):
        ahead = [now + momentum * (now - then) for now, then in zip(w, before, strict=True)]
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), ahead, strict=True):
                parameter.copy_(value)
        inputs, targets = mini_batch(step, count)
        gradients = torch.autograd.grad(functional.cross_entropy(model(inputs), targets), list(model.parameters()))
        moved = zip(w, before, gradients, strict=True)
        w, before = [now - rate * g + momentum * (now - then) for now, then, g in moved], w
    return w


def stepped(strategy: Strategy, comm: Communicator, steps: range) -> None:
    for step in steps:
        share = part_of(mini_batch(step, COUNT), comm.rank, comm.size)
        if strategy.summary().get("virtual_ranks"):
            each = 12 // comm.size
            shards = [part_of(mini_batch(step, COUNT), comm.rank * each + one, 12) for one in range(each)]
            share = type(share)([], sum(one.samples for one in shards), COUNT, shards=shards)
        strategy.step(share)


def assert_at(model: nn.Module, wanted: list[Tensor]) -> None:
    for given, value in zip(point(model), wanted, strict=True):
        torch.testing.assert_close(given, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("choice", "gradients"),
    [(SYNC, WHOLE), (SYNC, SHARDED), (VIRTUAL, WHOLE)],
    ids=["whole", "sharded", "virtual ranks"],
)
def test_nesterov_is_evaluated_saved_and_left_where_the_textbook_has_it(
    comm: Communicator, choice: StrategyOptions, gradients: GradientOptions
) -> None:
    strategy = strategy_on(comm, network(), choice, NESTEROV, gradients)
    assert (strategy.sharded is not None) is (gradients is SHARDED)
    stepped(strategy, comm, range(3))
    ahead = point(strategy.model)
    with strategy.consensus():
        assert_at(strategy.model, textbook(3, COUNT))
        saved = copy.deepcopy(strategy.model.state_dict())
    assert all(map(torch.equal, point(strategy.model), ahead))
    state = copy.deepcopy((strategy.optimizer.state_dict(), strategy.state_dict()))
    stepped(strategy, comm, range(3, 5))
    end = point(strategy.model)

    # From a rank's own state the same bits, without it the same up to rounding.
    for own in (True, False):
        resumed = strategy_on(comm, network(), choice, NESTEROV, gradients)
        resumed.model.load_state_dict(saved)
        resumed.optimizer.load_state_dict(copy.deepcopy(state[0]))
        if own:
            resumed.load_state_dict(state[1])
        else:
            resumed.restart(3)
        stepped(resumed, comm, range(3, 5))
        if own:
            assert all(map(torch.equal, point(resumed.model), end))
        assert_at(resumed.model, end)
    strategy.finish()
    assert_at(strategy.model, textbook(5, COUNT))


def test_nesterov_that_is_late_is_evaluated_with_all_sums_applied(comm: Communicator) -> None:
    strategy = strategy_on(comm, network(), DELAYED, NESTEROV)
    stepped(strategy, comm, range(4))
    with strategy.consensus():
        looked = point(strategy.model)
    strategy.finish()
    assert all(map(torch.equal, point(strategy.model), looked))
    # The formula with the gradient of a step before, at the point ahead of then.
    model = network()
    w = before = point(model)
    gradients: list[Any] = []
    for step in range(5):
        if step < 4:
            ahead = [now + 0.8 * (now - then) for now, then in zip(w, before, strict=True)]
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), ahead, strict=True):
                    parameter.copy_(value)
            inputs, targets = mini_batch(step, COUNT)
            loss = functional.cross_entropy(model(inputs), targets)
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        if step >= 1:
            moved = zip(w, before, gradients[step - 1], strict=True)
            w, before = [now - 0.1 * g + 0.8 * (now - then) for now, then, g in moved], w
    assert_at(strategy.model, w)


@pytest.mark.parametrize("name", ["heavy-ball", "nesterov"])
def test_local_steps_average_the_parameters_as_they_lie(comm: Communicator, name: str) -> None:
    options = OptimizerOptions(optimizer=name, lr=0.1, momentum=0.8)
    strategy = anchored(comm, Local(), 3, options)
    train(strategy, comm, 6, COUNT)
    world = World(comm.size, COUNT, options)
    simulate(world, 6, 3, average, replace)
    assert_same(strategy.model, world.models[comm.rank])


# ---- Newton


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("count", [2, 13])
def test_newton_takes_the_hessian_of_the_whole_mini_batch(comm: Communicator, count: int, rounds: int) -> None:
    options = OptimizerOptions(optimizer="newton", damping=0.5, weight_decay=0.1)
    strategy = strategy_on(comm, network(), SYNC, options)
    train(strategy, comm, 3, count, rounds)
    model: Any = network()
    optimizer: Any = build_optimizer(options, model.parameters())
    for step in range(3):
        inputs, targets = mini_batch(step, count)

        def loss() -> Tensor:
            return functional.cross_entropy(model(inputs), targets)  # noqa: B023 - called within this very round

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure, lambda: hessian_of(loss(), list(model.parameters())))
    assert_same(strategy.model, model)
    assert strategy.optimizer.param_groups[0]["damping"] == optimizer.param_groups[0]["damping"]


def test_newton_takes_local_steps_by_own_hessians(comm: Communicator) -> None:
    options = OptimizerOptions(optimizer="newton", damping=0.5)
    strategy = anchored(comm, Local(), 1, options)
    train(strategy, comm, 2, 3 * comm.size)
    assert not torch.equal(point(strategy.model)[0], point(network())[0])


@pytest.mark.parametrize(
    ("choice", "gradients", "text"),
    [
        (DELAYED, WHOLE, "--optimizer newton: .* --strategy delayed cannot follow"),
        (VIRTUAL, WHOLE, "--optimizer newton: .* --virtual-ranks 12 rules out"),
        (SYNC, SHARDED, "--shard-optimizer: Newton decides by the whole gradient"),
        (SYNC, GradientOptions(sync_batch_norm=True), "--sync-batch-norm: it cannot be differentiated twice"),
    ],
)
def test_where_newton_cannot_be_is_one_line(
    comm: Communicator, choice: StrategyOptions, gradients: GradientOptions, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        strategy_on(comm, network(), choice, OptimizerOptions(optimizer="newton"), gradients)
