"""How many elements a sparsifier sends: a share of all, larger at first.

Warm-up of Lin et al., "Deep gradient compression", ICLR 2018, arXiv 1712.01887: while a model changes fast, 25 %,
6.25 %, 1.5625 % and 0.4 % of the elements are sent, each for a quarter of the warm-up, then 0.1 % or what `ratio` says.
"""

import math
from dataclasses import dataclass

__all__ = ["Density"]

_STAGES = 4
_FACTOR = 0.25


@dataclass(frozen=True)
class Density:
    """Sends `ratio` of the elements after `warmup_steps` steps."""

    ratio: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}, allowed are shares above 0 and up to 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, allowed are 0 and more")

    def at(self, step: int) -> float:
        """Return the share that is sent in step 0, 1, ..."""
        if step >= self.warmup_steps:
            return self.ratio
        stage = _STAGES * step // self.warmup_steps
        return max(self.ratio, _FACTOR ** (stage + 1))

    def count(self, step: int, length: int) -> int:
        """Return how many of `length` elements are sent: at least one, if there is any."""
        return min(length, max(1, math.ceil(self.at(step) * length)))
