"""Anchored methods by hand: all ranks' models in one process, one formula a line, and their training side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.build import build_codec
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.anchored import Anchored
from allreduce_sgd.strategies.method import Method
from allreduce_sgd.strategies.period import Period
from tests.mpi.test_strategies import PLAIN_SGD, mini_batch, network, part_of

Outer = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""Makes the new z of the old one, the mean, and what is kept for this parameter."""
Merge = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Makes the new x of x now, x as it was sent, the old z and the new z."""


def anchored(
    comm: Communicator,
    method: Method,
    period: Period | int,
    optimizer: OptimizerOptions = PLAIN_SGD,
    model: nn.Module | None = None,
    compression: CompressionOptions | None = None,
    gradients: GradientOptions | None = None,
    **more: Any,
) -> Anchored:
    """The strategy, with buckets of one or two parameters each."""
    made = network() if model is None else model
    return Anchored(
        method,
        made,
        build_optimizer(optimizer, made.parameters()),
        comm,
        optimizer.clip_norm,
        Period(period) if isinstance(period, int) else period,
        gradients or GradientOptions(bucket_mb=2e-4),
        build_codec(compression or CompressionOptions(), seed=3, rank=comm.rank, size=comm.size),
        **more,
    )


@dataclass
class World:
    """The models of `size` ranks, of which each steps by its own part of every mini-batch of `count` samples."""

    size: int
    count: int
    options: OptimizerOptions
    models: list[nn.Module] = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.models = [network() for _ in range(self.size)]
        self.optimizers = [build_optimizer(self.options, model.parameters()) for model in self.models]

    def values(self, index: int) -> list[Tensor]:
        """The values of this parameter on all ranks, as a copy."""
        return [list(model.parameters())[index].detach().clone() for model in self.models]

    def set(self, index: int, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for model, value in zip(self.models, values, strict=True):
                list(model.parameters())[index].copy_(value)

    def samples(self, rank: int) -> int:
        return part_of(mini_batch(self.step, self.count), rank, self.size).samples

    def local_step(self) -> None:
        for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            share = part_of(mini_batch(self.step, self.count), rank, self.size)
            if share.losses:
                optimizer.zero_grad()
                share.losses[0](model).backward()
                optimizer.step()
        self.step += 1


def simulate(
    world: World,
    steps: int,
    period: int,
    outer: Outer,
    merge: Merge,
    delay: int = 0,
    fragments: Sequence[Sequence[int]] = ((0, 1, 2, 3),),
    early: bool = False,
    equal: bool = False,
) -> list[Tensor]:
    """Train so many steps by these formulas, and return z, by parameter."""
    anchors = [values[0] for values in map(world.values, range(4))]
    kept: list[dict[str, Tensor]] = [{} for _ in range(4)]
    sent: dict[int, list[Tensor]] = {}
    weights: dict[int, list[float]] = {}
    counts = [[0] * world.size for _ in range(4)]
    for step in range(1, steps + 1):
        starting = [
            index
            for place, fragment in enumerate(fragments)
            for index in fragment
            if (step - period * (place + 1) // len(fragments)) % period == 0
            and step >= period * (place + 1) // len(fragments)
        ]
        arriving = [
            index
            for place, fragment in enumerate(fragments)
            for index in fragment
            if (step - delay - period * (place + 1) // len(fragments)) % period == 0
            and step - delay >= period * (place + 1) // len(fragments)
        ]
        before = [world.values(index) for index in range(4)]
        for index in range(4):
            counts[index] = [count + world.samples(rank) for rank, count in enumerate(counts[index])]
        world.local_step()
        for index in starting:
            sent[index] = before[index] if early else world.values(index)
            total = sum(counts[index])
            weights[index] = [1 / world.size if equal else count / total for count in counts[index]]
            counts[index] = [0] * world.size
        for index in arriving:
            mean = sum(weight * value for weight, value in zip(weights[index], sent[index], strict=True))
            old, new = anchors[index], outer(anchors[index], torch.as_tensor(mean), kept[index])
            now = world.values(index)
            world.set(index, [merge(x, x_sent, old, new) for x, x_sent in zip(now, sent[index], strict=True)])
            anchors[index] = new
    return anchors


def replace(x: Tensor, sent: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return new


def carry(x: Tensor, sent: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return x + new - sent


def average(z: Tensor, mean: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return mean
