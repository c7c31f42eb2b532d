"""Training with virtual ranks: the same bits on any number of ranks as on one, whatever depends on ranks elsewhere."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.data.sampling import share
from allreduce_sgd.errors import NonFiniteError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.random_state import random_state
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.build import build_strategy
from allreduce_sgd.strategies.options import StrategyOptions

SHARDS = 12
SGD = OptimizerOptions(lr=0.1, momentum=0.9, clip_norm=0.5)


class Changing(nn.Module):
    """Everything that could follow the rank: statistics, counters, random numbers, parameters used now and then."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(2)
        self.seldom = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.1]))
        self.to(dtype)
        self.register_buffer("drift", torch.zeros(2, dtype=torch.bfloat16))
        self.drift: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs).view(len(inputs), 2, 3)).flatten(1)
        hidden = functional.dropout(torch.tanh(hidden), 0.3, self.training)
        if self.training:
            hidden = hidden * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
            self.drift += hidden.detach()[0, :2]
        if float(inputs[0, 0]) > 0.5:
            hidden = self.seldom(hidden)
        outputs: Tensor = self.last(hidden)
        return outputs


def batch_of(step: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 6, generator=generator).to(dtype), torch.randint(3, (count,), generator=generator)


def virtual_share(batch: tuple[Tensor, Tensor], comm: Communicator, shards: int = SHARDS) -> Share:
    total = len(batch[0])

    def loss_of(piece: slice) -> Callable[[nn.Module], Tensor]:
        return lambda model: functional.cross_entropy(model(batch[0][piece]), batch[1][piece])

    each = shards // comm.size
    parts = [share(total, leaf, shards) for leaf in range(comm.rank * each, (comm.rank + 1) * each)]
    own = [Share([loss_of(part)] if part.stop > part.start else [], part.stop - part.start, total) for part in parts]
    return Share([], sum(one.samples for one in own), total, shards=own)


def built(comm: Communicator, model: nn.Module, optimizer: OptimizerOptions = SGD, **more: Any) -> Strategy:
    options = StrategyOptions(virtual_ranks=more.pop("shards", SHARDS))
    gradients = more.pop("gradients", GradientOptions(bucket_mb=2e-4, first_bucket_mb=1e-4))
    return build_strategy(options, gradients, optimizer, model, comm, **more)


def train(strategy: Strategy, comm: Communicator, steps: range, count: int, shards: int = SHARDS) -> Strategy:
    dtype = next(strategy.model.parameters()).dtype
    for step in steps:
        strategy.step(virtual_share(batch_of(step, count, dtype), comm, shards))
    return strategy


def assert_same_bits(strategy: Strategy, expected: Strategy, comm: Communicator) -> None:
    digests = all_gather_object(comm, parameters_sha256(strategy.model))
    assert digests == [parameters_sha256(expected.model)] * comm.size


@pytest.mark.parametrize("count", [5, 24, 29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_those_of_one_rank(comm: Communicator, count: int, dtype: torch.dtype) -> None:
    """With empty shards, equal ones and unequal ones."""
    alone = SingleCommunicator()
    expected = train(built(alone, Changing(dtype)), alone, range(6), count)
    strategy = train(built(comm, Changing(dtype)), comm, range(6), count)
    assert_same_bits(strategy, expected, comm)
    assert strategy.summary() == {"virtual_ranks": SHARDS}
    fresh: Any = Changing(dtype)
    model: Any = strategy.model
    # No shard has changed these, or had a gradient of them.
    assert torch.equal(model.mask, fresh.mask)
    assert torch.equal(model.never.weight, fresh.never.weight)
    assert not torch.equal(model.seldom.weight, fresh.seldom.weight)
    assert int(model.norm.num_batches_tracked) == 6


@pytest.mark.parametrize(
    ("optimizer", "precision", "steps"),
    [
        (OptimizerOptions(optimizer="adam", lr=0.01, clip_norm=0.1), "fp32", 4),
        (OptimizerOptions(optimizer="lbfgs", lr=0.1), "fp32", 1),
        (SGD, "fp16", 4),
    ],
    ids=["adam", "lbfgs", "scaled losses"],
)
def test_optimizers_and_scaled_losses(
    comm: Communicator, optimizer: OptimizerOptions, precision: str, steps: int
) -> None:
    alone = SingleCommunicator()
    expected = train(built(alone, Changing(), optimizer, precision=precision), alone, range(steps), 29)
    strategy = train(built(comm, Changing(), optimizer, precision=precision), comm, range(steps), 29)
    assert_same_bits(strategy, expected, comm)
    assert strategy.skipped_steps() == expected.skipped_steps()


def test_models_of_bfloat16_and_sparse_gradients(comm: Communicator) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(9, 4, sparse=True)
            self.last = nn.Linear(8, 3, dtype=torch.bfloat16)

        def forward(self, inputs: Tensor) -> Tensor:
            codes = (inputs[:, :2].abs() * 4).long().clamp(max=8)
            outputs: Tensor = self.last(self.words(codes).flatten(1).bfloat16())
            return outputs.float()

    alone = SingleCommunicator()
    expected = train(built(alone, Mixed()), alone, range(5), 29)
    assert_same_bits(train(built(comm, Mixed()), comm, range(5), 29), expected, comm)


def test_it_is_synchronous_sgd_on_the_whole_mini_batch(comm: Communicator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    whole = copy.deepcopy(model)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    strategy = train(built(comm, model), comm, range(6), 29)
    for step in range(6):
        inputs, targets = batch_of(step, 29, torch.float64)
        optimizer.zero_grad()
        functional.cross_entropy(whole(inputs), targets).backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
        optimizer.step()
    for mine, expected in zip(strategy.model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_running_statistics_are_averages_over_shards_weighed_by_samples(comm: Communicator) -> None:
    shards = 2 * comm.size
    model = nn.Sequential(nn.BatchNorm1d(6, momentum=0.25), nn.Linear(6, 3)).double()
    inputs, targets = batch_of(1, 5 * comm.size + 1, torch.float64)
    strategy = built(comm, model, shards=shards)
    strategy.step(virtual_share((inputs, targets), comm, shards))
    parts = [inputs[share(len(inputs), leaf, shards)] for leaf in range(shards)]
    mean = torch.stack([part.mean(0) * len(part) for part in parts]).sum(0) / len(inputs)
    variance = torch.stack([part.var(0) * len(part) for part in parts]).sum(0) / len(inputs)
    norm: Any = model[0]
    torch.testing.assert_close(norm.running_mean, 0.25 * mean)
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * variance)


def test_random_numbers_follow_seed_step_and_shard_and_others_are_left_alone(comm: Communicator) -> None:
    drawn: list[tuple[float, float, float]] = []

    def loss(model: nn.Module) -> Tensor:
        drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
        return model(torch.ones(1, 6)).sum()

    each = SHARDS // comm.size
    own = Share([], each, SHARDS, shards=[Share([loss], 1, SHARDS)] * each)
    strategy = built(comm, nn.Linear(6, 1), seed=3)
    torch.manual_seed(comm.rank)
    before = random_state(torch.device("cpu"))
    strategy.step(own)
    strategy.step(own)
    after = random_state(torch.device("cpu"))
    assert torch.equal(after["torch"], before["torch"])
    assert after["python"] == before["python"]
    assert torch.equal(after["numpy"][1], before["numpy"][1])
    everyone = [number for theirs in all_gather_object(comm, drawn) for numbers in theirs for number in numbers]
    assert len(set(everyone)) == 2 * SHARDS * 3
    again = list(drawn)
    strategy.restart(0)
    strategy.step(own)
    assert drawn[2 * each :] == again[:each]
    other = built(comm, nn.Linear(6, 1), seed=4)
    other.step(own)
    assert not set(drawn[3 * each :]) & set(again)


def test_one_rank_goes_on_from_the_state_of_several_and_back(comm: Communicator) -> None:
    alone = SingleCommunicator()
    expected = train(built(alone, Changing()), alone, range(9), 24)
    first = train(built(comm, Changing()), comm, range(3), 24)
    second = built(alone, Changing())
    for before, after in ((first, second), (second, built(comm, Changing()))):
        after.model.load_state_dict(before.model.state_dict())
        after.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        start = 3 if after is second else 6
        last = train(after, after.comm, range(start, start + 3), 24)
    assert_same_bits(last, expected, comm)


def test_what_is_not_finite_names_parameter_and_rank(comm: Communicator) -> None:
    strategy = built(comm, nn.Linear(6, 3), gradients=GradientOptions(check_finite=True))
    inputs, targets = batch_of(0, 24, torch.float32)
    strategy.step(virtual_share((inputs, targets), comm))
    inputs[23] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"rank {comm.size - 1}: weight, bias|rank {comm.size - 1}: bias, weight"):
        strategy.step(virtual_share((inputs, targets), comm))


def test_parameters_without_a_gradient_can_be_made_an_error(comm: Communicator) -> None:
    strategy = built(comm, Changing(), gradients=GradientOptions(find_unused_parameters=False))
    with pytest.raises(RuntimeError, match=rf"rank {comm.rank}: parameters got no gradient in this step: .*never"):
        strategy.step(virtual_share(batch_of(0, 24, torch.float32), comm))
