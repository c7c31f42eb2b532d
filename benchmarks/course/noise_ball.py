"""The noise ball of SGD: how far from the minimum mini-batches keep it, by how they are drawn.

The loss of sample i at x is λ x² / 2 + ξ_i x, with ξ of mean 0 and variance σ² over N samples, so that a mini-batch of
b samples has the gradient λ x + mean ξ. With step η and a = ηλ, x settles around 0 with

- samples drawn with replacement: E x² = η² σ² / (b a (2 - a))
- a subset drawn anew for each step: (N - b) / (N - 1) times that
- stretches of a permutation of all samples, another in each epoch: less, as errors cancel within an epoch

The project's samplers and its synchronous strategy make the steps, of many x with ξ of their own at once. Every batch
divides N. The points are means over chains, each of its own seed, and bars are two standard errors to each side.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.data.sampling import build_sampler
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.synchronous import Synchronous

__all__ = ["mean_squares", "noise_ball"]

_SAMPLES = 256
_COORDINATES = 200
_LR, _CURVATURE, _SIGMA = 0.25, 2.0, 1.0
_A = _LR * _CURVATURE
_SETTLING_STEPS = 32
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SERIES = {
    "replacement": "with replacement",
    "uniform": "random subsets",
    "epoch": "permutation per epoch",
}
_ERRORS_SHOWN = 2.0


class _Quadratic(nn.Module):
    """The mean over a mini-batch of λ x² / 2 + ξ x, summed over coordinates (d,), for ξ (b, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(_COORDINATES))

    def forward(self, xi: Tensor) -> Tensor:
        return (_CURVATURE / 2 * self.x.square() + xi.mean(0) * self.x).sum()


def noise_ball(chains: int, seed: int = 0, batch_sizes: Sequence[int] = _BATCH_SIZES) -> list[dict[str, Any]]:
    """Return the figure's rows: a line for each formula, points for each way of drawing samples."""
    shared = {
        "figure": "noise_ball",
        "title": "Noise ball of SGD on a quadratic",
        "x_label": "mini-batch b (samples)",
        "y_label": "E x², in units of η²σ²",
        "x_log": True,
        "y_log": True,
        "note": f"N = {_SAMPLES} samples, a = {_A:g}; bars are two standard errors to each side",
        "runs": [],
    }
    rows: list[dict[str, Any]] = []
    for sampling, name in _SERIES.items():
        means, errors = zip(*(_mean_and_error(sampling, batch, chains, seed) for batch in batch_sizes), strict=True)
        points = {
            "series": name,
            "x": list(batch_sizes),
            "y": list(means),
            # Half the mean is far enough below it for a logarithmic axis where chains are few.
            "low": [max(mean - _ERRORS_SHOWN * error, mean / 2) for mean, error in zip(means, errors, strict=True)],
            "high": [mean + _ERRORS_SHOWN * error for mean, error in zip(means, errors, strict=True)],
            "n": chains,
        }
        rows.append({**shared, **points})
    for name, subsets in (("1 / (b a (2 − a))", False), ("… · (N − b) / (N − 1)", True)):
        line = {
            "series": name,
            "x": list(batch_sizes),
            "y": [formula(batch, subsets) for batch in batch_sizes],
            "low": None,
            "high": None,
            "n": None,
        }
        rows.append({**shared, **line})
    return rows


def formula(batch: int, subsets: bool) -> float:
    """Return E x² / (η² σ²) as theory has it, for subsets drawn without replacement or samples drawn with it."""
    independent = 1 / (batch * _A * (2 - _A))
    return independent * (_SAMPLES - batch) / (_SAMPLES - 1) if subsets else independent


def mean_squares(sampling: str, batch: int, chains: int, seed: int) -> Tensor:
    """Return the mean of x² / (η² σ²) over coordinates and steps, of each chain (chains,) float32."""
    threads = torch.get_num_threads()
    # Steps are so short that threads would mostly wait for one another.
    torch.set_num_threads(1)
    try:
        return torch.tensor([_chain(sampling, batch, seed * 1000 + chain) for chain in range(chains)])
    finally:
        torch.set_num_threads(threads)


def _chain(sampling: str, batch: int, seed: int) -> float:
    xi = torch.randn(_SAMPLES, _COORDINATES, generator=torch.Generator().manual_seed(seed))
    xi = _SIGMA * (xi - xi.mean(0)) / xi.std(0, correction=0)
    sampler = build_sampler(sampling, _SAMPLES, batch, seed)
    model = _Quadratic()
    strategy = Synchronous(
        model, lambda groups: torch.optim.SGD(groups, lr=_LR), SingleCommunicator(), None, GradientOptions()
    )
    settling = -(-_SETTLING_STEPS // sampler.steps_per_epoch)
    squares = []
    # Whole epochs, as places within an epoch of a permutation differ.
    for epoch in range(2 * settling):
        for step in range(sampler.steps_per_epoch):
            strategy.step(Share([_loss(xi[sampler.indices(epoch, step, 0, 1)])], batch, batch))
            if epoch >= settling:
                squares.append(float(model.x.detach().square().mean()))
    strategy.finish()
    return sum(squares) / len(squares) / (_LR * _SIGMA) ** 2


def _loss(xi: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(xi)


def _mean_and_error(sampling: str, batch: int, chains: int, seed: int) -> tuple[float, float]:
    means = mean_squares(sampling, batch, chains, seed)
    return float(means.mean()), float(means.std()) / sqrt(chains)
