"""Steps to a target against batch size: the fit of S = S_min (1 + B_crit / B), with its uncertainty.

McCandlish et al. 2018 (An Empirical Model of Large-Batch Training, arXiv 1812.06162): a target takes at least S_min
steps, however large the batch, and at least E_min = S_min B_crit samples, however small. At B = B_crit it takes twice
as many of both. Equivalently E = B S = E_min (1 + B / B_crit).

Runs vary by factors rather than by differences, so log S is fitted, every run's relative error counts alike, and an
outlier's counts linearly rather than squared. The paper fits one curve to the Pareto front of tuned runs; here every
run is a point, and the ranges come from a bootstrap over the runs of each batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, inf, isinf, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from benchmarks.study.results import Study
from benchmarks.table import format_number

__all__ = ["Fit", "fit_hyperbola", "points_of"]

_Array = NDArray[np.float64]

_OURS = ("serial", "one_rank_all_cores", "allreduce_sgd")
_SYNCHRONOUS = ("serial", "sync")
_PARAMETERS = 2
_FEWEST_BATCHES = 3
_RESAMPLES = 400
_QUANTILES = (0.025, 0.975)
_OUTLYING = 0.2
"""Errors of log S count squared up to about this."""
_BEYOND = 1000.0
"""B_crit is looked for from so far below the smallest batch to so far above the largest."""
_AT_BOUND = 0.99


@dataclass(frozen=True)
class Fit:
    """Steps to the target, S = s_min (1 + b_crit / B), of batches of B samples.

    The ranges are 95 % intervals; an end that the data leave open is 0 or infinite. `residual` is the median over runs
    of |S / fit - 1|. `n` runs were fitted, with batches from the first to the second of `batches`; `missed` more did
    not reach the target, which makes the fit an optimistic one, as the slow runs are those left out. `draws`, (n, 2),
    are the (S_min, B_crit) of the bootstrap.
    """

    s_min: float
    b_crit: float
    s_min_range: tuple[float, float]
    b_crit_range: tuple[float, float]
    residual: float
    n: int
    missed: int
    batches: tuple[int, int]
    draws: _Array = field(repr=False, compare=False)

    @property
    def e_min(self) -> float:
        """The samples to the target with batches far smaller than b_crit."""
        return self.s_min * self.b_crit

    def steps(self, batch: float) -> float:
        return self.s_min * (1 + self.b_crit / batch)

    def steps_range(self, batch: float) -> tuple[float, float]:
        """Return the 95 % interval of the steps with this batch; S_min and B_crit vary together."""
        low, high = np.quantile(self.draws[:, 0] * (1 + self.draws[:, 1] / batch), _QUANTILES).tolist()
        return low, high

    def samples(self, batch: float) -> float:
        return batch * self.steps(batch)

    def describe(self) -> dict[str, str]:
        """Return the columns of a table, by header."""
        return {
            "S_min, steps": _with_range(self.s_min, self.s_min_range),
            "B_crit, samples": _with_range(self.b_crit, self.b_crit_range),
            "E_min, samples": format_number(self.e_min),
            "median error, %": format_number(100 * self.residual),
            "runs": str(self.n),
            "missed": str(self.missed),
        }


def fit_hyperbola(points: Sequence[tuple[int, float]], seed: int = 0, resamples: int = _RESAMPLES) -> Fit:
    """Fit the points (batch, steps to the target), one per run; infinite ones are left out and counted.

    `seed` is that of the bootstrap, of `resamples` fits. Its ranges held the truth in 91 to 95 of 100 simulated studies
    with three or five runs per batch, but in only 78 to 89 of 100 with a single one.

    Raises ValueError where runs reached the target at fewer than three batches, as the curve goes through any two
    points, and where batches or steps are not above zero.
    """
    if not all(batch > 0 and steps > 0 for batch, steps in points):
        raise ValueError("batches and steps to the target must be above zero")
    reached = sorted((batch, steps) for batch, steps in points if not isinf(steps))
    batches = sorted({batch for batch, _ in reached})
    if len(batches) < _FEWEST_BATCHES:
        raise ValueError(
            f"the fit needs runs that reach the target at {_FEWEST_BATCHES} batches, not at {len(batches)}"
        )
    batch, steps = np.array(reached, dtype=np.float64).T
    bounds = (np.log(batches[0] / _BEYOND), np.log(batches[-1] * _BEYOND))
    fitted = _solve(batch, np.log(steps), bounds, None)
    drawn = _resample(batch, np.log(steps), fitted, resamples, np.random.default_rng(seed))
    estimates = np.array([_solve(batch, log_steps, bounds, fitted) for log_steps in drawn])
    draws = np.exp(estimates)
    (s_low, b_low), (s_high, b_high) = np.quantile(draws, _QUANTILES, axis=0).tolist()
    if b_low * _AT_BOUND < exp(bounds[0]):
        b_low = 0.0
    if b_high > exp(bounds[1]) * _AT_BOUND:
        s_low, b_high = 0.0, inf
    return Fit(
        s_min=exp(fitted[0]),
        b_crit=exp(fitted[1]),
        s_min_range=(s_low, s_high),
        b_crit_range=(b_low, b_high),
        residual=float(np.median(np.abs(np.expm1(np.log(steps) - _curve(fitted, batch))))),
        n=len(reached),
        missed=len(points) - len(reached),
        batches=(batches[0], batches[-1]),
        draws=draws,
    )


def points_of(study: Study) -> list[tuple[int, float]]:
    """Return (global batch, steps to the target) of each measured run of ours that is plain synchronous SGD.

    Ranks and threads do not matter to that, so cells which differ in these are one. Compressed runs are left out, and
    those with flags of their own, which may be another momentum or decay.
    """
    return [
        (run.cell.global_batch_size, run.steps)
        for run in study.runs
        if run.phase == "measured"
        and run.cell.contender in _OURS
        and run.cell.strategy in _SYNCHRONOUS
        and run.cell.compression == "none"
        and not run.cell.flags
    ]


def _curve(parameters: _Array, batch: _Array) -> _Array:
    """Return log S for (log S_min, log B_crit)."""
    log_s_min, log_b_crit = parameters
    return log_s_min + np.log1p(np.exp(log_b_crit) / batch)


def _solve(batch: _Array, log_steps: _Array, bounds: tuple[float, float], start: _Array | None) -> _Array:
    """Return the (log S_min, log B_crit) that fit best, from the best of a grid of B_crit where `start` is None."""

    def slopes(parameters: _Array) -> _Array:
        b_crit = np.exp(parameters[1])
        return np.stack([np.ones_like(batch), b_crit / (batch + b_crit)], axis=1)

    if start is None:
        grid = [_level(log_b_crit, batch, log_steps) for log_b_crit in np.linspace(*bounds, 50)[1:-1]]
        start = min(grid, key=lambda each: np.abs(log_steps - _curve(each, batch)).sum())
    found = least_squares(
        lambda parameters: _curve(parameters, batch) - log_steps,
        start,
        jac=slopes,
        bounds=([-inf, bounds[0]], [inf, bounds[1]]),
        loss="soft_l1",
        f_scale=_OUTLYING,
        xtol=1e-10,
        ftol=1e-10,
        gtol=1e-10,
    )
    solution: _Array = found.x
    return solution


def _level(log_b_crit: float, batch: _Array, log_steps: _Array) -> _Array:
    """Return (log S_min, log B_crit) where S_min suits the median run."""
    return np.array([np.median(log_steps - _curve(np.array([0.0, log_b_crit]), batch)), log_b_crit])


def _resample(batch: _Array, log_steps: _Array, fitted: _Array, count: int, generator: np.random.Generator) -> _Array:
    """Return `count` sets of log S, (count, runs), each drawn from the runs of its batch, or near its only run."""
    drawn = np.empty((count, len(batch)))
    errors = log_steps - _curve(fitted, batch)
    pooled = errors * sqrt(len(batch) / (len(batch) - _PARAMETERS))
    for each in np.unique(batch):
        here = batch == each
        runs = int(here.sum())
        if runs == 1:
            drawn[:, here] = log_steps[here] + generator.choice(pooled, (count, 1))
        else:
            middle = log_steps[here].mean()
            # Drawn from so few runs, deviations would be too small by this factor.
            deviations = (log_steps[here] - middle) * sqrt(runs / (runs - 1))
            drawn[:, here] = middle + generator.choice(deviations, (count, runs))
    return drawn


def _with_range(value: float, ends: tuple[float, float]) -> str:
    return f"{format_number(value)} [{format_number(ends[0])}–{format_number(ends[1])}]"
