"""How each optimizer goes down a toy landscape, in double precision, with a learning rate from a grid.

The grid is the same for all: 1 and 3 times powers of ten, from 0.001 to 30. Of it an optimizer gets the rate that ends
lowest after all steps (where several end within 10^-12 of the minimum, the one that is there first). On a landscape
without a minimum it gets the one that is down first, of those that take no step longer than a quarter of the picture,
since a leap gets down from anywhere. All optimizers get the same noise, step by step.

A step is one gradient, except where an optimizer asks for more. L-BFGS makes one of its iterations in a step; `newton`
is the method without damping, as it stands in textbooks, `newton-damped` the one that the trainer has.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.optim import Optimizer

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.build import build_optimizer, optimizer_names
from allreduce_sgd.optim.nesterov import Nesterov
from allreduce_sgd.optim.options import OptimizerOptions
from benchmarks.toy_landscapes import Landscape

__all__ = [
    "FAMILIES",
    "LEARNING_RATES",
    "Contender",
    "Trajectory",
    "best",
    "contenders",
    "descend",
    "known_contenders",
    "lowest_value",
    "steps_to",
    "without_noise",
]

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_MOMENTUM = 0.9
_ARRIVED = 1e-12
_LONGEST_STEP = 0.25
_BOXES_AWAY = 2.0
"""A trajectory that leaves the picture by so many times its size has diverged."""

_FIRST, _ADAPTIVE, _SECOND, _OTHER = "Gradient descent and momentum", "Adaptive", "Second order", "Others"
FAMILIES = (_FIRST, _ADAPTIVE, _SECOND, _OTHER)


@dataclass(frozen=True, eq=False)
class Contender:
    """An optimizer as the trainer builds it from these options, but for its learning rate."""

    name: str
    family: str
    options: OptimizerOptions
    noisy: bool = True
    """Whether it gets the noise of a landscape that has some."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The points (k + 1, 2) after 0 to k steps, float64, and the value at each (k + 1,)."""

    lr: float
    points: Tensor
    values: Tensor
    gradients: int
    """How many gradients were computed on the way."""
    diverged: bool

    @property
    def steps(self) -> int:
        return len(self.points) - 1


def _course() -> Mapping[str, Contender]:
    first = {
        "sgd": OptimizerOptions("sgd", momentum=0.0),
        "sgd-momentum": OptimizerOptions("sgd", momentum=_MOMENTUM),
        "sgd-nesterov": OptimizerOptions("sgd", nesterov=True, momentum=_MOMENTUM),
        "heavy-ball": OptimizerOptions("heavy-ball", momentum=_MOMENTUM),
        "nesterov": OptimizerOptions("nesterov", momentum=_MOMENTUM),
    }
    adaptive = ("adagrad", "rmsprop", "adadelta", "adam", "amsgrad", "adamw")
    second = {
        "lbfgs": OptimizerOptions("lbfgs", max_iterations=1),
        "newton": OptimizerOptions("newton", damping=0.0),
        "newton-damped": OptimizerOptions("newton"),
    }
    return {
        **{name: Contender(name, _FIRST, options) for name, options in first.items()},
        **{name: Contender(name, _ADAPTIVE, OptimizerOptions(name)) for name in adaptive},
        **{name: Contender(name, _SECOND, options) for name, options in second.items()},
    }


def known_contenders() -> dict[str, Contender]:
    """Return all contenders by name: the course's, then whatever else the trainer can build for two weights."""
    known = optimizer_names()
    course = {name: each for name, each in _course().items() if each.options.optimizer in known}
    built = {each.options.optimizer for each in course.values()}
    others = (name for name in sorted(known) if name not in built and _takes_two_weights(name))
    return course | {name: Contender(name, _OTHER, OptimizerOptions(name)) for name in others}


def contenders(names: Sequence[str] | None = None) -> list[Contender]:
    """Return the contenders of these names, None for the course's. Raises ConfigError for an unknown one."""
    known = known_contenders()
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--optimizers: unknown value {name!r}; choose from all, {', '.join(known)}")
    return [each for name, each in known.items() if (each.family != _OTHER if names is None else name in names)]


def without_noise(landscape: Landscape) -> list[Contender]:
    """Return what is shown on a landscape with noise for comparison: SGD that gets none."""
    return [replace(_course()["sgd"], name="sgd, no noise", noisy=False)] if landscape.noise else []


def descend(landscape: Landscape, contender: Contender, lr: float, steps: int, seed: int = 0) -> Trajectory:
    """Take `steps` steps from the start, fewer where the trajectory gets down to `bottom` or diverges.

    The noise ξ of a step is added to the function as ξ·w, which adds ξ to its gradient wherever it is asked for.
    """
    weights = nn.Parameter(torch.tensor(landscape.start, dtype=torch.float64))
    optimizer = build_optimizer(replace(contender.options, lr=lr), [weights])
    noise = landscape.noise * torch.randn(steps, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if not contender.noisy:
        noise.zero_()
    step: Callable[..., Any] = optimizer.step
    if "hessian" in inspect.signature(step).parameters:
        step = functools.partial(step, hessian=lambda: hessian(landscape.value, weights.detach()))
    gradients = 0
    points = [weights.detach().clone()]
    diverged = False
    for kick in noise:

        def closure(kick: Tensor = kick) -> Tensor:
            nonlocal gradients
            gradients += 1
            optimizer.zero_grad()
            loss = landscape.value(weights) + kick @ weights
            loss.backward()
            return loss

        step(closure)
        points.append(_result(optimizer, weights))
        if landscape.bottom is not None and float(landscape.value(points[-1])) <= landscape.bottom:
            break
        if _far_away(landscape, points[-1]):
            diverged = True
            break
    stacked = torch.stack(points)
    return Trajectory(lr, stacked, landscape.value(stacked), gradients, diverged)


def best(landscape: Landscape, contender: Contender, steps: int, seed: int = 0) -> Trajectory:
    """Return the trajectory with the learning rate of the grid that does best; of equal ones the smallest."""
    return min(
        (descend(landscape, contender, lr, steps, seed) for lr in LEARNING_RATES),
        key=lambda trajectory: _rank(landscape, trajectory),
    )


def steps_to(trajectory: Trajectory, value: float | None) -> int | None:
    """Return after how many steps the trajectory was first at this value or below it; None: never."""
    there = (trajectory.values <= (-math.inf if value is None else value)).nonzero()
    return int(there[0]) if len(there) else None


def lowest_value(landscape: Landscape) -> float | None:
    if landscape.minimum is None:
        return None
    return float(landscape.value(torch.tensor(landscape.minimum(), dtype=torch.float64)))


def _result(optimizer: Optimizer, weights: nn.Parameter) -> Tensor:
    """Return what training would end with now; textbook Nesterov has its parameters ahead of that in training."""
    if not isinstance(optimizer, Nesterov):
        return weights.detach().clone()
    optimizer.look_back_()
    result = weights.detach().clone()
    optimizer.look_ahead_()
    return result


def _rank(landscape: Landscape, trajectory: Trajectory) -> tuple[float, ...]:
    """Return what is the smaller, the better the trajectory."""
    lowest = lowest_value(landscape)
    end = math.inf if trajectory.diverged else float(trajectory.values[-1])
    reached = steps_to(trajectory, landscape.bottom if lowest is None else lowest + _ARRIVED)
    steps = math.inf if reached is None else reached
    if lowest is None:
        return _leaps(landscape, trajectory), steps, end
    return max(end - lowest, _ARRIVED), steps


def _leaps(landscape: Landscape, trajectory: Trajectory) -> bool:
    width = max(high - low for low, high in landscape.box)
    return float(trajectory.points.diff(dim=0).norm(dim=1).max()) > _LONGEST_STEP * width


def _far_away(landscape: Landscape, point: Tensor) -> bool:
    return not all(
        low - _BOXES_AWAY * (high - low) <= float(at) <= high + _BOXES_AWAY * (high - low)
        for at, (low, high) in zip(point, landscape.box, strict=True)
    )


def _takes_two_weights(name: str) -> bool:
    """Say whether the optimizer steps on a vector; some take matrices only, or sparse gradients."""
    weights = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def closure() -> Tensor:
        loss = weights.square().sum()
        loss.backward()
        return loss

    try:
        optimizer: Any = build_optimizer(OptimizerOptions(optimizer=name), [weights])
        optimizer.step(closure)
    except (ConfigError, RuntimeError, ValueError):
        return False
    return True
