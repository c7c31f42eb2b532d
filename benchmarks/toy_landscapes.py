"""Functions of two numbers on which optimizers are watched, each with its gradient in closed form.

- logistic: the mean logistic loss log(1 + exp(-s x·w)) of 40 samples x with labels s = ±1 of which no line divides all
  rightly, so that there is a minimum; since the two features go together, it curves 11 times as much across as along
- beale: Beale's function (1958), (1.5 - x + x y)² + (2.25 - x + x y²)² + (2.625 - x + x y³)², with the minimum 0 at
  (3, 1/2), a flat valley that leads there, and walls that are steep towards the corners
- saddle: y⁴ - x⁴, started beside the axis x = 0; at the saddle (0, 0) the Hessian is zero, and downhill there is no end
- saddle-axis: the same, started on the axis, where the gradient never leaves it, with noise added to all gradients
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["LANDSCAPES", "Landscape"]

Point = tuple[float, float]

_SAMPLES = 40
_SEED = 1958
_NEWTON_STEPS = 30


@dataclass(frozen=True)
class Landscape:
    """A function of points (..., 2), which gives values (...), and of what a trajectory on it is to be seen.

    `gradient` is its gradient (..., 2) in closed form. `box` holds the ends of both axes of a picture. `minimum` is
    None where the values have no lower end; then a trajectory has got down, and ends, at the value `bottom`.
    """

    title: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    start: Point
    box: tuple[Point, Point]
    minimum: Callable[[], Point] | None
    axes: tuple[str, str] = ("x", "y")
    noise: float = 0.0
    """Standard deviation of what is added to each entry of every gradient."""
    bottom: float | None = None


@functools.cache
def _data() -> tuple[Tensor, Tensor]:
    """Return the samples (40, 2) and their labels (40,), which are 1 or -1."""
    generator = torch.Generator().manual_seed(_SEED)
    common, own, chance = torch.rand(3, _SAMPLES, generator=generator, dtype=torch.float64)
    first = 6 * common - 3
    samples = torch.stack([first, 0.6 * first + 1.6 * own - 0.8], dim=1)
    rightly = torch.sigmoid(samples @ torch.tensor([0.4, 1.6], dtype=torch.float64))
    return samples, torch.where(chance < rightly, 1.0, -1.0).double()


def _logistic(w: Tensor) -> Tensor:
    samples, labels = _data()
    return softplus(-labels * (w @ samples.T)).mean(-1)


def _logistic_gradient(w: Tensor) -> Tensor:
    samples, labels = _data()
    return (-labels * torch.sigmoid(-labels * (w @ samples.T))) @ samples / len(samples)


@functools.cache
def _logistic_minimum() -> Point:
    samples, _ = _data()
    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        probability = torch.sigmoid(samples @ w)
        hessian = (samples.T * (probability * (1 - probability))) @ samples / len(samples)
        w = w - torch.linalg.solve(hessian, _logistic_gradient(w))
    return float(w[0]), float(w[1])


def _beale(w: Tensor) -> Tensor:
    x, y = w.unbind(-1)
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _beale_gradient(w: Tensor) -> Tensor:
    x, y = w.unbind(-1)
    first, second, third = 1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3
    by_x = 2 * (first * (y - 1) + second * (y**2 - 1) + third * (y**3 - 1))
    by_y = 2 * x * (first + 2 * second * y + 3 * third * y**2)
    return torch.stack([by_x, by_y], dim=-1)


def _saddle(w: Tensor) -> Tensor:
    x, y = w.unbind(-1)
    return y**4 - x**4


def _saddle_gradient(w: Tensor) -> Tensor:
    x, y = w.unbind(-1)
    return torch.stack([-4 * x**3, 4 * y**3], dim=-1)


_SADDLE_BOX = ((-1.1, 1.1), (-0.95, 1.25))
_DOWN = -0.25

LANDSCAPES: Mapping[str, Landscape] = MappingProxyType(
    {
        "logistic": Landscape(
            title="Logistic regression of two weights",
            value=_logistic,
            gradient=_logistic_gradient,
            start=(-2.0, 4.0),
            box=((-4.0, 5.0), (-4.0, 5.0)),
            minimum=_logistic_minimum,
            axes=("first weight", "second weight"),
        ),
        "beale": Landscape(
            title="Beale's function",
            value=_beale,
            gradient=_beale_gradient,
            start=(1.0, 1.5),
            box=((-0.5, 4.5), (-1.75, 2.0)),
            minimum=lambda: (3.0, 0.5),
        ),
        "saddle": Landscape(
            title="Saddle y⁴ − x⁴, from beside the axis",
            value=_saddle,
            gradient=_saddle_gradient,
            start=(0.1, 1.0),
            box=_SADDLE_BOX,
            minimum=None,
            bottom=_DOWN,
        ),
        "saddle-axis": Landscape(
            title="Saddle y⁴ − x⁴, from the axis, with noise",
            value=_saddle,
            gradient=_saddle_gradient,
            start=(0.0, 1.0),
            box=_SADDLE_BOX,
            minimum=None,
            noise=0.1,
            bottom=_DOWN,
        ),
    }
)
