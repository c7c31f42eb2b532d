"""Numbers and curves of runs, read from their metrics.jsonl and summary.json."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.course.runs import entries

__all__ = ["Measure", "curve", "final", "last", "lowest", "over_first_epoch", "over_last_epoch"]

_NEARLY = 1e-6


@dataclass(frozen=True)
class Measure:
    """A number of a run, by what it is called in tables."""

    name: str
    of: Callable[[Path], float]


def final(name: str, column: str) -> Measure:
    """A number of the run's summary, so of the model that the run ends with."""
    return Measure(name, lambda folder: _number(_summary(folder)[column]))


def last(name: str, column: str) -> Measure:
    """A number of the last evaluation during the run."""
    return Measure(name, lambda folder: _evaluated(folder, column)[-1])


def lowest(name: str, column: str) -> Measure:
    """The lowest number of all evaluations during the run."""
    return Measure(name, lambda folder: min(_evaluated(folder, column)))


def over_first_epoch(name: str, column: str) -> Measure:
    """The mean over the samples of the first epoch, of what is logged while training."""
    return Measure(name, lambda folder: _by_epoch(folder, column)[1][0])


def over_last_epoch(name: str, column: str) -> Measure:
    """The mean over the samples of the last epoch, of what is logged while training."""
    return Measure(name, lambda folder: _by_epoch(folder, column)[1][-1])


def curve(folders: Sequence[Path], event: str, column: str) -> dict[str, Any]:
    """Return median, lowest and highest over the runs at each epoch, as far as all runs of them went.

    Of what is logged while training ("train") the mean over an epoch's samples; None stands for infinity.
    """
    runs = [_by_epoch(folder, column) if event == "train" else _by_evaluation(folder, column) for folder in folders]
    places = min((epochs for epochs, _ in runs), key=len)
    points = list(zip(*(values for _, values in runs), strict=False))
    return {
        "x": places,
        "y": [_or_none(statistics.median(values)) for values in points],
        "low": [_or_none(min(values)) for values in points],
        "high": [_or_none(max(values)) for values in points],
    }


def _by_evaluation(folder: Path, column: str) -> tuple[list[float], list[float]]:
    found = [each for each in entries(folder) if each["event"] == "evaluation"]
    return [each["epoch"] for each in found], [_number(each[column]) for each in found]


def _by_epoch(folder: Path, column: str) -> tuple[list[float], list[float]]:
    epochs: list[float] = []
    means: list[float] = []
    total, reached, before = 0.0, 0, 0
    for each in entries(folder):
        if each["event"] != "train":
            continue
        total += _number(each[column]) * (each["samples"] - reached)
        reached = each["samples"]
        # The trainer logs at the end of every epoch.
        if abs(each["epoch"] - round(each["epoch"])) < _NEARLY:
            epochs.append(each["epoch"])
            means.append(total / (reached - before))
            total, before = 0.0, reached
    return epochs, means


def _evaluated(folder: Path, column: str) -> list[float]:
    return _by_evaluation(folder, column)[1]


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def _number(value: float | None) -> float:
    """Return the number; what is none in JSON, where a loss was not finite, is infinite."""
    return math.inf if value is None else float(value)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
