"""The numbers of a study that its figures, tables and sentences share: one `Measured` for each cell."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from benchmarks.speedup import SERIAL, SpeedUp, by_cell, speed_up, speed_up_range
from benchmarks.study.results import Cell, Run, Study

__all__ = ["Measured", "Tuning", "at_edge_of_grid", "fastest_serial", "measure", "ordered_runs", "shown", "tuning_of"]


@dataclass(frozen=True)
class Measured:
    """A cell's measured runs, one a seed. `first_row` is the number of the first in the table of all runs."""

    cell: Cell
    name: str
    runs: tuple[Run, ...]
    first_row: int
    speed_up: SpeedUp
    speed_up_range: tuple[float, float] | None

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def missed(self) -> int:
        return sum(not run.reached for run in self.runs)

    @property
    def seconds(self) -> float:
        return self.median(lambda run: run.seconds)

    @property
    def samples(self) -> float:
        return self.median(lambda run: run.samples)

    @property
    def cores_used(self) -> int:
        return self.cell.ranks * self.cell.threads

    @property
    def median_run(self) -> Run:
        """The run of the (lower) median of seconds to the target."""
        middle = statistics.median_low(run.seconds for run in self.runs)
        return next(run for run in self.runs if run.seconds == middle)

    @property
    def label(self) -> str:
        """The name, with how many runs there are and how many missed the target."""
        missed = f", {self.missed} missed" if self.missed else ""
        return f"{self.name} (n = {self.n}{missed})"

    def median(self, value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, self.runs))

    def range(self, value: Callable[[Run], float]) -> tuple[float, float]:
        return min(map(value, self.runs)), max(map(value, self.runs))


@dataclass(frozen=True)
class Tuning:
    """What was spent on choosing a cell's learning rate."""

    rates: tuple[float, ...]
    runs: int


def ordered_runs(study: Study) -> list[Run]:
    """Return all runs, measured ones first, cell by cell and by seed: row n of the table of runs is number n - 1."""
    measured = [run for runs in by_cell(study.runs).values() for run in sorted(runs, key=lambda run: run.seed)]
    tuning = [run for run in study.runs if run.phase == "tuning"]
    places = {cell: place for place, cell in enumerate(dict.fromkeys(run.cell for run in study.runs))}
    return measured + sorted(tuning, key=lambda run: (places[run.cell], run.lr, run.seed))


def measure(study: Study) -> list[Measured]:
    """Return the cells that have measured runs, in the order in which they first appear."""
    cells = by_cell(study.runs)
    names = Counter(cell.label for cell in cells)
    found: list[Measured] = []
    row = 1
    for cell, unordered in cells.items():
        runs = sorted(unordered, key=lambda run: run.seed)
        name = cell.label if names[cell.label] == 1 else f"{cell.label} [{len(found) + 1}]"
        found.append(Measured(cell, name, tuple(runs), row, speed_up(runs, cells), speed_up_range(runs, cells)))
        row += len(runs)
    return found


def fastest_serial(cells: Sequence[Measured]) -> Measured | None:
    """Return serial SGD at that batch, of those tried, that reaches the target soonest."""
    serial = [each for each in cells if each.cell.contender == SERIAL]
    return min(serial, key=lambda each: each.seconds, default=None)


def shown(cells: Sequence[Measured], most: int) -> list[Measured]:
    """Return at most so many cells: where there are more, of each method the soonest batch, then the soonest of all."""
    if len(cells) <= most:
        return list(cells)
    soonest: dict[tuple[object, ...], Measured] = {}
    for each in cells:
        cell = each.cell
        method = (cell.contender, cell.strategy, cell.ranks, cell.threads, cell.algorithm, cell.compression)
        key = (*method, cell.network, cell.flags)
        if key not in soonest or each.seconds < soonest[key].seconds:
            soonest[key] = each
    kept = sorted(soonest.values(), key=lambda each: each.seconds)[:most]
    return [each for each in cells if each in kept]


def tuning_of(study: Study, cell: Cell) -> Tuning:
    runs = [run for run in study.runs if run.phase == "tuning" and run.cell == cell]
    return Tuning(tuple(sorted({run.lr for run in runs})), len(runs))


def at_edge_of_grid(study: Study, measured: Measured) -> bool:
    """Say whether the chosen learning rate is the smallest or largest of those tried, so that others may be better."""
    rates = tuning_of(study, measured.cell).rates
    return len(rates) > 1 and measured.runs[0].lr in (rates[0], rates[-1])


def finite(value: float) -> bool:
    return value < inf
