"""Strategies against serial references, for all optimizers, with equal, unequal and empty shares."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.data.sampling import share
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.build import build_optimizer, optimizer_names
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.build import build_strategy
from allreduce_sgd.strategies.options import StrategyOptions

Batch = tuple[Tensor, Tensor]
PLAIN_SGD = OptimizerOptions(momentum=0.0, lr=0.1)


def network(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).to(dtype)


def mini_batch(step: int, count: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(count, 5, generator=generator, dtype=dtype)
    return inputs, torch.randint(3, (count,), generator=generator)


def part_of(batch: Batch, rank: int, size: int, rounds: int = 1) -> Share:
    """The share of one rank, in `rounds` micro-batches."""
    total = len(batch[0])
    own = share(total, rank, size)
    inputs, targets = batch[0][own], batch[1][own]
    samples = len(inputs)

    def loss_of(piece: slice) -> Callable[[nn.Module], Tensor]:
        def compute(model: nn.Module) -> Tensor:
            fraction = (piece.stop - piece.start) / samples
            return functional.cross_entropy(model(inputs[piece]), targets[piece]) * fraction

        return compute

    pieces = [share(samples, index, rounds) for index in range(rounds)]
    return Share([loss_of(piece) for piece in pieces if piece.stop > piece.start], samples, total)


def strategy_on(
    comm: Communicator,
    model: nn.Module,
    options: StrategyOptions | None = None,
    optimizer: OptimizerOptions = PLAIN_SGD,
    gradients: GradientOptions | None = None,
    **more: Any,
) -> Strategy:
    """A strategy with buckets of one or two parameters each; not sharded unless `gradients` say so."""
    given = gradients or GradientOptions(shard_optimizer=False)
    given = dataclasses.replace(given, bucket_mb=2e-4, first_bucket_mb=1e-4)
    return build_strategy(options or StrategyOptions(), given, optimizer, model, comm, **more)


def train(strategy: Strategy, comm: Communicator, steps: int, count: int, rounds: int = 1) -> nn.Module:
    dtype = next(strategy.model.parameters()).dtype
    for step in range(steps):
        strategy.step(part_of(mini_batch(step, count, dtype), comm.rank, comm.size, rounds))
    return strategy.model


def assert_same(model: nn.Module, other: nn.Module, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=rtol, atol=atol), f"{name}: {mine} is not {theirs}"


def serial(options: OptimizerOptions, steps: int, count: int, bias: bool = True) -> nn.Module:
    """A plain loop over whole mini-batches, without any of our code but the construction of the optimizer."""
    model = network(bias=bias)
    optimizer = build_optimizer(options, model.parameters())
    for step in range(steps):
        inputs, targets = mini_batch(step, count)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), targets)  # noqa: B023 - called within this very round
            loss.backward()
            if options.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return model


# SparseAdam takes sparse gradients only, which no model here has; Newton's method is tested in test_optimizers.py.
OPTIMIZERS = sorted(set(optimizer_names()) - {"sparseadam", "newton"})


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sync_equals_serial_after_50_steps(comm: Communicator, optimizer: str, shard: bool) -> None:
    if shard and optimizer == "lbfgs":
        pytest.skip("decides by the whole gradient")
    # Muon takes matrices only.
    bias = optimizer != "muon"
    options = OptimizerOptions(optimizer=optimizer, lr=0.01)
    gradients = GradientOptions(shard_optimizer=shard)
    strategy = strategy_on(comm, network(bias=bias), StrategyOptions(), options, gradients)
    count = 3 * comm.size + 1
    # LBFGS takes up to 20 iterations a step, and on a mini-batch that changes under it, it diverges by itself.
    steps = 3 if optimizer == "lbfgs" else 50
    # Muon multiplies in bfloat16 within, so a last bit of difference before grows to a hundredth after.
    tolerance = 2e-2 if optimizer == "muon" else 1e-6
    assert_same(
        train(strategy, comm, steps, count), serial(options, steps, count, bias), rtol=tolerance, atol=tolerance
    )
    assert len(set(all_gather_object(comm, parameters_sha256(strategy.model)))) == 1


def test_sync_in_single_precision_equals_serial_to_its_tolerance(comm: Communicator) -> None:
    options = OptimizerOptions(lr=0.1, momentum=0.9)
    alone = SingleCommunicator()
    expected = train(strategy_on(alone, network(torch.float32), StrategyOptions(), options), alone, 50, 12)
    strategy = strategy_on(comm, network(torch.float32), StrategyOptions(), options)
    assert_same(train(strategy, comm, 50, 12), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_sync_with_unequal_and_empty_shares_and_accumulation(comm: Communicator, count: int) -> None:
    options = OptimizerOptions(lr=0.1, clip_norm=0.3)
    expected = serial(options, 10, count)
    for rounds in (1, 2, 3):
        strategy = strategy_on(comm, network(), StrategyOptions(), options)
        assert_same(train(strategy, comm, 10, count, rounds), expected)


def test_one_rank_is_serial_bit_for_bit(comm: Communicator) -> None:
    alone = SingleCommunicator()
    options = OptimizerOptions(lr=0.1, momentum=0.9)
    expected = parameters_sha256(serial(options, 20, 6))
    for name in ("sync", "local"):
        for each in (alone, comm) if comm.size == 1 else (alone,):
            strategy = strategy_on(each, network(), StrategyOptions(strategy=name, period=3), options)
            train(strategy, each, 20, 6)
            strategy.finish()
            assert parameters_sha256(strategy.model) == expected


@pytest.mark.parametrize("count", [1, 7, 12])
def test_local_with_period_1_equals_sync_for_plain_sgd(comm: Communicator, count: int) -> None:
    options = OptimizerOptions(momentum=0.0, lr=0.1)
    synchronous = train(strategy_on(comm, network(), StrategyOptions(), options), comm, 20, count)
    local = train(strategy_on(comm, network(), StrategyOptions(strategy="local", period=1), options), comm, 20, count)
    assert_same(local, synchronous)


def test_local_averages_first_exactly_at_the_period(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    strategy = strategy_on(comm, network(), StrategyOptions(strategy="local", period=3))
    sent = []
    for step in range(7):
        before = comm.traffic.bytes_sent or 0
        strategy.step(part_of(mini_batch(step, 12), comm.rank, comm.size))
        sent.append((comm.traffic.bytes_sent or 0) - before)
        views = all_gather_object(comm, parameters_sha256(strategy.model))
        assert len(set(views)) == (1 if step in (2, 5) else comm.size)
    assert [step for step, sent_bytes in enumerate(sent) if sent_bytes] == [2, 5]


def test_local_average_is_that_of_ranks_that_stepped_alone(comm: Communicator) -> None:
    """k-step averaging against its definition: each rank's course computed serially, then the mean."""
    period, count = 4, 3 * comm.size
    options = OptimizerOptions(lr=0.1, momentum=0.9)
    models = [network() for _ in range(comm.size)]
    optimizers = [build_optimizer(options, model.parameters()) for model in models]
    for step in range(2 * period):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            part_of(mini_batch(step, count), rank, comm.size).losses[0](model).backward()
            optimizer.step()
        if (step + 1) % period == 0:
            with torch.no_grad():
                for copies in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack([each.detach() for each in copies]).mean(0)
                    for each in copies:
                        each.copy_(mean)
    strategy = strategy_on(comm, network(), StrategyOptions(strategy="local", period=period), options)
    assert_same(train(strategy, comm, 2 * period, count), models[0])


def test_consensus_of_local_is_the_average_and_leaves_no_trace(comm: Communicator) -> None:
    model: Any = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    strategy = strategy_on(comm, model, StrategyOptions(strategy="local", period=100))
    train(strategy, comm, 3, 4 * comm.size)
    before = parameters_sha256(model)
    alone = [value.tolist() for value in (model[1].running_mean, model[2].weight)]
    means = [torch.tensor(each, dtype=torch.float64) for each in zip(*all_gather_object(comm, alone), strict=True)]
    with strategy.consensus():
        torch.testing.assert_close(model[1].running_mean, means[0].mean(0))
        torch.testing.assert_close(model[2].weight.detach(), means[1].mean(0))
        agreed = parameters_sha256(model)
        assert len(set(all_gather_object(comm, agreed))) == 1
    assert parameters_sha256(model) == before
    strategy.finish()
    assert parameters_sha256(model) == agreed


@pytest.mark.parametrize("name", ["sync", "local"])
def test_a_strategy_goes_on_from_its_state_bit_for_bit(comm: Communicator, name: str) -> None:
    options = OptimizerOptions(lr=0.1, momentum=0.9)
    choice = StrategyOptions(strategy=name, period=3)
    whole = strategy_on(comm, network(), choice, options)
    train(whole, comm, 4, 12)
    state = copy.deepcopy(whole.state_dict())
    model = copy.deepcopy(whole.model.state_dict())
    optimizer = copy.deepcopy(whole.optimizer.state_dict())
    train(whole, comm, 4, 12)
    resumed = strategy_on(comm, network(), choice, options)
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.load_state_dict(state)
    train(resumed, comm, 4, 12)
    assert parameters_sha256(resumed.model) == parameters_sha256(whole.model)


COURSE = (torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 1.0, -1.0, -1.0]))


@pytest.mark.parametrize(
    ("batches", "courses"),
    [
        ([slice(0, 1), slice(1, 2)], [(0.0, 1.0), (0.0, 1.0)]),
        ([slice(0, 2), slice(2, 4)], [(0.5, 1.0), (-0.25, 1.0)]),
    ],
)
def test_golden_course_example(comm: Communicator, batches: list[slice], courses: list[tuple[float, float]]) -> None:
    """f(x) = w.x, squared loss, step 0.5, from (0, 0): mini-batches of one and of two samples, on any ranks."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    strategy = strategy_on(comm, model, StrategyOptions(), OptimizerOptions(lr=0.5, momentum=0.0))
    for batch, expected in zip(batches, courses, strict=True):
        inputs, targets = COURSE[0][batch], COURSE[1][batch]
        own = share(len(inputs), comm.rank, comm.size)

        def loss(module: nn.Module, own: slice = own, inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            return functional.mse_loss(module(inputs[own]).squeeze(1), targets[own])

        losses = [loss] if own.stop > own.start else []
        strategy.step(Share(losses, own.stop - own.start, len(inputs)))
        assert tuple(model.weight[0].tolist()) == expected
