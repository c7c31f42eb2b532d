"""What a sweep leaves behind: a line of results.jsonl for every training that has ended, well or not."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from allreduce_sgd.durable import replace_file
from allreduce_sgd.errors import ConfigError, OutputError, quoted
from allreduce_sgd.sweep.search import Trial
from allreduce_sgd.sweep.spec import Spec, Value

__all__ = ["Outcome", "Result", "Results", "outcomes"]

RESULTS = "results.jsonl"
_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "trial": (int,),
        "seed": (int,),
        "reach": (int, type(None)),
        "parameters": (dict,),
        "value": (int, float, type(None)),
        "error": (str, type(None)),
        "seconds": (int, float),
        "ranks": (int,),
    }
)


@dataclass(frozen=True)
class Result:
    """A training that has ended, or come to a rung of halving: `reach` epochs or steps, None without halving.

    `value` is that of the metric, None where the training failed, of which `error` tells in a line. `seconds` are those
    of the training's processes, from the rung before, on `ranks` ranks.
    """

    trial: int
    seed: int
    reach: int | None
    parameters: Mapping[str, Value]
    value: float | None
    error: str | None
    seconds: float
    ranks: int


@dataclass(frozen=True)
class Outcome:
    """A trial: its results at the furthest rung that it came to, one for each seed; `seconds` of all its results."""

    trial: Trial
    results: tuple[Result, ...]
    seconds: float

    @property
    def error(self) -> str | None:
        return next((each.error for each in self.results if each.error is not None), None)

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(each.value for each in self.results if each.value is not None)

    @property
    def value(self) -> float | None:
        """The median over seeds, None where one of them failed."""
        return None if self.error is not None or not self.values else statistics.median(self.values)

    @property
    def reach(self) -> int | None:
        return self.results[0].reach


class Results:
    """Reads the file, and appends to it. Raises ConfigError where it is not of these trials."""

    def __init__(self, folder: Path, trials: Sequence[Trial], retry_failed: bool = False) -> None:
        self._path = folder / RESULTS
        self._found: dict[tuple[int, int, int | None], Result] = {}
        if not self._path.exists():
            return
        by_number = {each.number: each for each in trials}
        for result in _read(self._path):
            trial = by_number.get(result.trial)
            if trial is None or dict(trial.parameters) != dict(result.parameters):
                raise ConfigError(
                    f"{self._path}: trial {result.trial} had {quoted(dict(result.parameters))}, which the spec beside "
                    f"it does not say; start a new sweep"
                )
            if result.error is None or not retry_failed:
                self._add(result)
        # Without a last line that was cut short.
        replace_file(self._path, "".join(map(_line, self._found.values())))

    def get(self, trial: int, seed: int, reach: int | None) -> Result | None:
        return self._found.get((trial, seed, reach))

    def append(self, result: Result) -> None:
        """Add a line, on disk when this returns. Raises OutputError."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(result))
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            raise OutputError(f"cannot write {self._path}: {problem.strerror}") from problem
        self._add(result)

    def of_trial(self, number: int) -> list[Result]:
        return [each for each in self._found.values() if each.trial == number]

    def _add(self, result: Result) -> None:
        self._found[result.trial, result.seed, result.reach] = result


def outcomes(spec: Spec, trials: Sequence[Trial], results: Results) -> list[Outcome]:
    """Return the trials that have results, best first: those that came furthest, by the metric; failed ones last."""
    found = []
    for trial in trials:
        own = results.of_trial(trial.number)
        if own:
            furthest = max(each.reach or 0 for each in own)
            last = tuple(sorted((each for each in own if (each.reach or 0) == furthest), key=lambda each: each.seed))
            found.append(Outcome(trial, last, sum(each.seconds for each in own)))
    sign = -1 if spec.goal == "max" else 1

    def rank(outcome: Outcome) -> tuple[bool, int, float, int]:
        value = outcome.value
        return value is None, -(outcome.reach or 0), 0.0 if value is None else sign * value, outcome.trial.number

    return sorted(found, key=rank)


def _line(result: Result) -> str:
    return json.dumps(asdict(result), allow_nan=False) + "\n"


def _read(path: Path) -> list[Result]:
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines):
        try:
            entry: dict[str, Any] = json.loads(line)
            if entry.keys() != _KINDS.keys() or any(type(entry[key]) not in _KINDS[key] for key in entry):
                raise ValueError
        except (ValueError, AttributeError, RecursionError):
            if number == len(lines) - 1:
                break
            raise ConfigError(f"{path}: line {number + 1} is no result of a sweep: {quoted(line)}") from None
        found.append(Result(**entry))
    return found
