"""Whether back-propagation gives the derivatives of the loss: a comparison with numerical differences before a run.

A copy of the model computes in float64, on a few training samples, in training mode: batch normalisation normalises by
the batch, as it does in training, and dropout draws the same mask in every forward pass, since each begins with the
same state of the random generators and the same buffers. The elements to check go round the parameters in a random
order, so that none is missed because others are larger, and are drawn at random within each. Every rank checks others;
the one with the largest error is told. See `numerical.py` for the differences, and for kinks.

Memory: twice that of the model; time: two to six forward passes per element.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from allreduce_sgd.data.split import Dataset
from allreduce_sgd.errors import ConfigError, counted
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.probes.numerical import TOLERANCE, relative_error
from allreduce_sgd.random_state import random_state, restore_random_state, seed_generators
from allreduce_sgd.topology import Topology
from allreduce_sgd.user_code import refusing

__all__ = ["Checked", "check_gradients", "worst_element"]

_SAMPLES = 8


class Checked(NamedTuple):
    """An element of a parameter, its derivative as back-propagation has it and numerically, and the relative error."""

    error: float
    element: str
    derivative: float
    numerical: float


def check_gradients(
    topology: Topology, model: nn.Module, loss: Loss, dataset: Dataset, device: torch.device, elements: int, seed: int
) -> str:
    """Compare so many elements on every rank, and return a line that tells the outcome. All ranks must call.

    `model` and the random generators are left as they are. Raises ConfigError, the same on all ranks, where an error is
    beyond the tolerance, or the model cannot compute in float64.
    """
    flag = f"--check-gradients {elements}"

    def check() -> Checked:
        inputs, targets = (part.to(device) for part in dataset.train.batch(torch.arange(_SAMPLES) % len(dataset.train)))
        with refusing(f"{flag}: a copy of the model in float64 cannot be trained"):
            return worst_element(model, loss, inputs, targets, elements, (seed, topology.rank))

    own = topology.agree(check)
    worst = max(topology.gather_all(own))
    told = (
        f"{worst.element}: back-propagation gives {worst.derivative:.6g}, a numerical difference {worst.numerical:.6g} "
        f"(relative error {worst.error:.1e}"
    )
    if worst.error > TOLERANCE:
        raise _on_rank_0(ConfigError(f"{flag}: the gradient of {told}; allowed is {TOLERANCE:g})"))
    ranks = "" if topology.size == 1 else f" on each of {topology.size} ranks"
    return f"gradients checked: {counted(elements, 'element')}{ranks}; the worst is {told})"


def worst_element(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, elements: int, seeds: Sequence[int]
) -> Checked:
    """Return the element with the largest error among so many, which follow from `seeds`.

    `inputs` (n, ...) and `targets` (n, ...); floating-point ones are taken in float64.
    """
    device = inputs.device
    inputs, targets = (part.double() if part.is_floating_point() else part for part in (inputs, targets))
    twin = copy.deepcopy(model).double().train()
    buffers = [(buffer, buffer.clone()) for buffer in twin.buffers()]
    before = random_state(device)

    def value() -> Tensor:
        # All forward passes alike: the same masks of dropout, from the same statistics.
        seed_generators(*seeds)
        with torch.no_grad():
            for buffer, first in buffers:
                buffer.copy_(first)
        return loss(twin(inputs), targets)

    def number() -> float:
        with torch.no_grad():
            return float(value())

    try:
        value().backward()
        return max(_checked(number, *chosen) for chosen in _choose(twin, elements, seeds))
    finally:
        restore_random_state(before, device)


def _checked(number: Callable[[], float], name: str, parameter: nn.Parameter, index: tuple[int, ...]) -> Checked:
    gradient = parameter.grad
    if gradient is not None and gradient.is_sparse:
        gradient = gradient.to_dense()
    derivative = 0.0 if gradient is None else float(gradient[index])
    error, numerical = relative_error(number, parameter.detach()[index], derivative)
    return Checked(error, f"{name}[{', '.join(map(str, index))}]", derivative, numerical)


def _choose(
    model: nn.Module, elements: int, seeds: Sequence[int]
) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Yield parameters in turn, each with the index of an element drawn from it."""
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad and one.numel()]
    generator = np.random.default_rng(seeds)
    order = generator.permutation(len(trained))
    for turn in range(elements):
        name, parameter = trained[order[turn % len(order)]]
        place = np.unravel_index(generator.integers(parameter.numel()), tuple(parameter.shape))
        yield name, parameter, tuple(map(int, place))


def _on_rank_0(problem: ConfigError) -> ConfigError:
    problem.rank = 0
    return problem
