"""The gradient noise scale, from what ranks know anyway: which mini-batch size pays.

McCandlish, Kaplan, Amodei and the OpenAI Dota team, "An empirical model of large-batch training", 2018, arXiv
1812.06162. The gradient of one sample scatters with covariance Sigma around the true gradient G. The simple noise scale
B = tr Sigma / |G|^2 is the mini-batch size at which the noise of the mean gradient is as large as the gradient itself:
far below it, twice the mini-batch saves nearly half the steps; far above, it saves hardly any. In the paper's model of
the steps that training takes, S = S_min (1 + B / b), both steps and samples are twice their least at b = B.

p ranks with b samples each know m, the mean of the squared norms of their own gradients, and q, the squared norm of
their average. Since E m = |G|^2 + tr Sigma / b and E q = |G|^2 + tr Sigma / (b p),

    tr Sigma ~ b p / (p - 1) (m - q),      |G|^2 ~ (p q - m) / (p - 1),

both without bias. Their ratio is not, and swings widely, so the averages over steps are taken first: exponential ones
that forget about 1/100 a measurement. Bytes: none but six numbers a logged step; work: the norm of every bucket before
and after its sum, in the steps that are measured.

Gradients are measured before clipping and weight decay, without the loss scale, only where all ranks have equally many
samples. Samples drawn without replacement scatter less around the mean of their epoch than Sigma says, by the share of
the data set that a mini-batch is.
"""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["NoiseScale"]

_KEPT = 0.99


class NoiseScale:
    """The noise scale of `ranks` ranks' gradients. Each rank makes one, adds what it measures, and hands on `take`."""

    def __init__(self, ranks: int) -> None:
        if ranks < 2:
            raise ValueError(f"the noise scale needs the gradients of at least 2 ranks, not {ranks}")
        self._ranks = ranks
        self._trace_part = self._square_part = self._count = 0.0
        self._trace = self._square = self._weight = 0.0

    def add(self, own_square: float, mean_square_part: float, samples: int) -> None:
        """Take in one step: the squared norm of this rank's mean gradient over its `samples`, and a part of that of the
        average over ranks, such that the parts of all ranks add up to it."""
        p, m_part = self._ranks, own_square / self._ranks
        self._trace_part += samples * p / (p - 1) * (m_part - mean_square_part)
        self._square_part += (p * mean_square_part - m_part) / (p - 1)
        self._count += 1 / p

    def take(self) -> dict[str, float]:
        """Return this rank's sums since the last time: their sums over ranks are what `update` wants."""
        sums = {
            "gradient_noise_trace": self._trace_part,
            "gradient_square": self._square_part,
            "noise_measurements": self._count,
        }
        self._trace_part = self._square_part = self._count = 0.0
        return sums

    def update(self, sums: Mapping[str, float]) -> None:
        """Take the sums over all ranks into the averages; those with an overflowed gradient in them are left out."""
        if not all(math.isfinite(value) for value in sums.values()) or sums["noise_measurements"] <= 0:
            return
        count = sums["noise_measurements"]
        kept = _KEPT**count
        self._trace = kept * self._trace + (1 - kept) * sums["gradient_noise_trace"] / count
        self._square = kept * self._square + (1 - kept) * sums["gradient_square"] / count
        self._weight = kept * self._weight + (1 - kept)

    @property
    def trace(self) -> float | None:
        """The average of tr Sigma; None before the first measurement."""
        return self._trace / self._weight if self._weight else None

    @property
    def square(self) -> float | None:
        """The average of |G|^2; None before the first measurement."""
        return self._square / self._weight if self._weight else None

    @property
    def value(self) -> float | None:
        """B, in samples; None as long as what is measured of G or Sigma is no more than noise."""
        return self._trace / self._square if self._square > 0 and self._trace > 0 else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "averages": [self._trace, self._square, self._weight],
            "sums": [self._trace_part, self._square_part, self._count],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._trace, self._square, self._weight = state["averages"]
        self._trace_part, self._square_part, self._count = state["sums"]
