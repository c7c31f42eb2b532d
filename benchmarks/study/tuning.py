"""The choice of every cell's learning rate, by the same rule and on the same budget.

The rate that needs fewest samples to the target counts, in the median over the tuning seeds. Within a cell a sample
takes as long at every rate, so that it is the soonest; but samples do not change with the load of the machine. Where
rates are equal in this, or none reaches the target, the one with the highest accuracy at the end counts. The seeds that
are reported have no say.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.study.results import Cell, Run

__all__ = ["FIRST_TUNING_SEED", "Choice", "choices"]

FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Choice:
    """The rate that a cell chose, and all that it had to choose from, in ascending order."""

    lr: float
    rates: tuple[float, ...]

    @property
    def on_edge(self) -> bool:
        """Whether a rate outside of the grid might have been better."""
        return len(self.rates) > 1 and self.lr in (self.rates[0], self.rates[-1])


def choices(runs: Iterable[Run]) -> dict[Cell, Choice]:
    """Return what the cells choose by their tuning runs, which must be all of them."""
    tried: dict[Cell, dict[float, list[Run]]] = {}
    for run in runs:
        if run.phase == "tuning":
            tried.setdefault(run.cell, {}).setdefault(run.lr, []).append(run)
    return {
        cell: Choice(min((_rank(runs), lr) for lr, runs in by_rate.items())[1], tuple(sorted(by_rate)))
        for cell, by_rate in tried.items()
    }


def _rank(runs: Sequence[Run]) -> tuple[float, float]:
    samples = statistics.median(run.samples for run in runs)
    return samples, -statistics.median(run.final_accuracy for run in runs)
