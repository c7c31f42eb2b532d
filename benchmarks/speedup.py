"""Speed-up of parallel over serial SGD, by three definitions that answer three questions.

With the medians over seeds T (training seconds to the target), S (samples to the target) and v (samples per second):

1. same batch      v_parallel / v_serial(B), serial SGD with the same global mini-batch B: how good is the
                   implementation?
2. per epoch       v_parallel / v_serial(1), and v_parallel / max over b of v_serial(b): how much faster does an epoch
                   pass? Accuracy is ignored.
3. to accuracy     T_serial(1) / T_parallel, and min over b of T_serial(b) / T_parallel: what counts. It splits:

    T_s/T_p  =  (S_p/T_p) / (S_s/T_s)   ×   S_s/S_p
    speed-up =  hardware efficiency     ×   statistical efficiency

Serial is one rank with one thread. A run that misses the target took infinitely long, so a cell most of whose runs
miss it has speed-up 0, and against such a baseline there is none.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isinf

from benchmarks.study.cells import SERIAL
from benchmarks.study.results import Cell, Run

__all__ = ["SERIAL", "SpeedUp", "best_serial", "by_cell", "speed_up", "speed_up_range"]


@dataclass(frozen=True)
class SpeedUp:
    """Of one cell; None where it is not defined or the baseline was not run."""

    same_batch: float | None
    epoch_over_batch_1: float | None
    epoch_over_best: float | None
    accuracy_over_batch_1: float | None
    accuracy_over_best: float | None
    hardware_efficiency: float | None
    statistical_efficiency: float | None


@dataclass(frozen=True)
class _Medians:
    batch_size: int
    seconds: float
    samples: float
    samples_per_second: float


def by_cell(runs: Iterable[Run]) -> dict[Cell, list[Run]]:
    """Group the measured runs by cell, in the order in which cells first appear."""
    groups: dict[Cell, list[Run]] = {}
    for run in runs:
        if run.phase == "measured":
            groups.setdefault(run.cell, []).append(run)
    return groups


def best_serial(cells: Mapping[Cell, Sequence[Run]]) -> Cell | None:
    """Return the serial cell that reaches the target soonest, in the median; None where none does."""
    seconds = {cell: _medians(runs).seconds for cell, runs in cells.items() if cell.contender == SERIAL}
    best = min(seconds, key=lambda cell: seconds[cell], default=None)
    return None if best is None or isinf(seconds[best]) else best


def speed_up(runs: Sequence[Run], cells: Mapping[Cell, Sequence[Run]]) -> SpeedUp:
    """Compare the runs of one cell with the serial cells among `cells`."""
    mine = _medians(runs)
    serial = [_medians(theirs) for cell, theirs in cells.items() if cell.contender == SERIAL]
    same = next((each for each in serial if each.batch_size == mine.batch_size), None)
    single = next((each for each in serial if each.batch_size == 1), None)
    fastest = max(serial, key=lambda each: each.samples_per_second, default=None)
    soonest = min(serial, key=lambda each: each.seconds, default=None)
    hardware = statistical = None
    if soonest is not None and not isinf(soonest.seconds) and not isinf(mine.seconds):
        hardware = (mine.samples / mine.seconds) / (soonest.samples / soonest.seconds)
        statistical = soonest.samples / mine.samples
    return SpeedUp(
        same_batch=_rate_ratio(mine, same),
        epoch_over_batch_1=_rate_ratio(mine, single),
        epoch_over_best=_rate_ratio(mine, fastest),
        accuracy_over_batch_1=_time_ratio(mine, single),
        accuracy_over_best=_time_ratio(mine, soonest),
        hardware_efficiency=hardware,
        statistical_efficiency=statistical,
    )


def speed_up_range(runs: Sequence[Run], cells: Mapping[Cell, Sequence[Run]]) -> tuple[float, float] | None:
    """Return the lowest and highest `accuracy_over_best` over a cell's seeds: baseline's median ÷ each seed's."""
    best = best_serial(cells)
    if best is None:
        return None
    baseline = _medians(cells[best]).seconds
    gains = [baseline / run.seconds for run in runs]
    return min(gains), max(gains)


def _medians(runs: Sequence[Run]) -> _Medians:
    return _Medians(
        runs[0].cell.global_batch_size,
        statistics.median(run.seconds for run in runs),
        statistics.median(run.samples for run in runs),
        statistics.median(run.samples_per_second for run in runs),
    )


def _rate_ratio(mine: _Medians, baseline: _Medians | None) -> float | None:
    return None if baseline is None else mine.samples_per_second / baseline.samples_per_second


def _time_ratio(mine: _Medians, baseline: _Medians | None) -> float | None:
    return None if baseline is None or isinf(baseline.seconds) else baseline.seconds / mine.seconds
