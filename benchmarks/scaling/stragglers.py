"""How long the slowest of many ranks takes: a distribution of step times, fitted or given.

A rank computes a step in (its mean time) · X, with X independent over ranks and steps, and E X = 1:

- lognormal     log X is normal with standard deviation sigma: many small disturbances that multiply
- exponential   X = 1 - share + share · Exp(1): a step has a least time, and rare long delays

A synchronous step waits for the slowest: E max of P values of X. Ranks that meet every H steps wait for the slowest sum
of H values, whose spread grows like the root of H only, so that local SGD suffers less. E max over P is the integral of
the quantile of u^(1/P) over u in (0, 1). A sum of exponentials has a gamma distribution; a sum of log-normals is taken
as log-normal with the same mean and variance (Fenton 1960, "The sum of log-normal probability distributions in scatter
transmission systems", IRE Trans. Comm. Systems).

Left out: ranks that are always slower than others, and disturbances that hit several ranks or steps at once.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special  # type: ignore[import-untyped]

__all__ = ["NO_STRAGGLERS", "Stragglers", "fit_stragglers", "parse_stragglers"]

_NODES = 4000
_SHORTEST, _LONGEST = 1e-12, 40.0
"""Of -log u; what is beyond has no weight."""
_COMPARED = 8
_MOST_BEYOND = 0.95
_WIDEST = 5.0
"""Sigma of a log-normal: far beyond what steps vary by, and far below what overflows."""

Kind = Literal["none", "lognormal", "exponential"]


@dataclass(frozen=True)
class Stragglers:
    """The distribution of X; `spread` is sigma of a lognormal, the share of an exponential, and 0 for none."""

    kind: Kind = "none"
    spread: float = 0.0

    def slowest(self, ranks: int, steps: int = 1) -> float:
        """Return E max over `ranks` of the mean of X over `steps` steps: 1 for one rank, never less."""
        if self.kind == "none" or self.spread == 0 or ranks == 1:
            return 1.0
        # The midpoints of parts of -log u, the finer the nearer u is to 1, where the quantile varies most.
        edges = np.concatenate([[0.0], np.geomspace(_SHORTEST, _LONGEST, _NODES)])
        upper, lower = np.exp(-edges[:-1]), np.exp(-edges[1:])
        middle = -np.log((upper + lower) / 2)
        beyond = -np.expm1(-middle / ranks)
        return max(1.0, float((self._quantile(beyond, steps) * (upper - lower)).sum()))

    def describe(self) -> str:
        return "none" if self.kind == "none" else f"{self.kind}:{self.spread:.3g}"

    def _quantile(self, beyond: npt.NDArray[np.float64], steps: int) -> npt.NDArray[np.float64]:
        """Return the mean over `steps` steps that is exceeded with these probabilities."""
        values: npt.NDArray[np.float64]
        if self.kind == "exponential":
            values = 1 - self.spread + self.spread * special.gammainccinv(steps, beyond) / steps
        else:
            variance = math.expm1(self.spread**2) / steps
            sigma = math.sqrt(math.log1p(variance))
            values = np.exp(-sigma * special.ndtri(beyond) - sigma**2 / 2)
        return values


NO_STRAGGLERS = Stragglers()


def fit_stragglers(factors: Sequence[float]) -> Stragglers:
    """Fit step times that are divided by their mean, by L-moments (Hosking, J. Royal Stat. Soc. B, 1990).

    Each distribution gets the spread that makes E max of two what it is in the data, which a rare outlier moves less
    than it moves a variance; of both, the one counts whose E max of eight is nearer. None for fewer than two factors.
    """
    values = np.sort(np.asarray(factors, dtype=np.float64))
    if len(values) < 2 or values[0] <= 0 or values[0] == values[-1]:
        return NO_STRAGGLERS
    values = values / values.mean()
    beyond = _expected_largest(values, 2) - 1
    fits = (
        Stragglers("lognormal", float(2 * special.erfinv(min(beyond, _MOST_BEYOND)))),
        Stragglers("exponential", min(1.0, float(2 * beyond))),
    )
    wanted = _expected_largest(values, _COMPARED)
    return min(fits, key=lambda fit: abs(fit.slowest(_COMPARED) - wanted))


def _expected_largest(ascending: npt.NDArray[np.float64], count: int) -> float:
    """Return E max of `count` values drawn from these, none twice."""
    numbers = np.arange(1, len(ascending) + 1)
    below = special.binom(numbers - 1, count - 1)
    return float((below * ascending).sum() / below.sum()) if below.sum() > 0 else float(ascending[-1])


def parse_stragglers(text: str) -> Stragglers:
    """Parse "none", "lognormal:SIGMA" or "exponential:SHARE" of a command line."""
    name, _, spread_text = text.partition(":")
    if text == "none":
        return NO_STRAGGLERS
    try:
        spread = float(spread_text)
    except ValueError:
        spread = math.nan
    if name == "lognormal" and 0 <= spread <= _WIDEST:
        return Stragglers("lognormal", spread)
    if name == "exponential" and 0 <= spread <= 1:
        return Stragglers("exponential", spread)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not none, lognormal:SIGMA with SIGMA from 0 to {_WIDEST:g}, or exponential:SHARE with SHARE from "
        f"0 to 1"
    )
