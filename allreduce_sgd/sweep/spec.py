"""The description of a sweep: a TOML file, every mistake in which is one line that names the file and the key.

Top level: how to search, and for what. [trainer]: flags of all trials. [parameters]: what is tried, a list of values or
a range by flag. [halving]: how far trials train before the worse ones are dropped. `specs/` has examples.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from allreduce_sgd.command_line import Flags
from allreduce_sgd.config import Option, check_text, options
from allreduce_sgd.errors import ConfigError, counted, quoted
from allreduce_sgd.toml_file import load_toml
from allreduce_sgd.toml_table import Table, boolean, count, folder_name, one_of

__all__ = ["GOALS", "METHODS", "METRICS", "Halving", "Parameter", "Spec", "Value", "parse_spec", "read_spec", "shipped"]

Value = str | int | float | bool
METHODS = ("grid", "random", "halving")
GOALS = ("max", "min")
METRICS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "test_accuracy": ("max", "fraction"),
        "test_loss": ("min", ""),
        "validation_accuracy": ("max", "fraction"),
        "validation_loss": ("min", ""),
        "train_loss": ("min", ""),
        "train_seconds": ("min", "s"),
        "wall_seconds": ("min", "s"),
        "samples_per_second": ("max", "1/s"),
    }
)
"""What trials can be compared by: the goal unless the spec names one, and the unit. All stand in summary.json."""

_SPECS = Path(__file__).parent / "specs"
_OPTIONS: Mapping[str, Option] = MappingProxyType({each.name: each for each in options()})
# What the sweep itself gives to every trial.
_OWN_FLAGS = frozenset("output pause-after-epochs pause-after-steps resume trace".split())
_UNITS = ("epochs", "steps")
# Those that every evaluation tells, also before the end of a run.
_EVALUATED = ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss")
_DIGITS = 6


@dataclass(frozen=True)
class Parameter:
    """A flag that is tried with several values: `values`, or, where there are none, any from `low` to `high`.

    `log`: its logarithm is what counts, for drawing from a range, and on the axis of the picture.
    """

    name: str
    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False

    @property
    def size(self) -> float:
        """How many values there are, infinite for a range of real numbers."""
        return len(self.values) or (self.high - self.low + 1 if self.integer else math.inf)

    def at(self, position: float) -> Value:
        """Return the value at a position from 0 up to 1, below which so much of the probability lies."""
        if self.values:
            return self.values[min(int(position * len(self.values)), len(self.values) - 1)]
        low, high = self.low, self.high + self.integer
        value = low * (high / low) ** position if self.log else low + (high - low) * position
        return min(int(value), int(self.high)) if self.integer else self._rounded(value)

    def spaced(self, points: int) -> tuple[Value, ...]:
        """Return so many values from `low` to `high`, in equal steps, or by equal factors where `log`."""
        positions = [point / (points - 1) for point in range(points)]
        low, high = self.low, self.high
        spaced = [low * (high / low) ** each if self.log else low + (high - low) * each for each in positions]
        return tuple(dict.fromkeys(round(each) if self.integer else self._rounded(each) for each in spaced))

    def _rounded(self, value: float) -> float:
        # So that values have short names; but not out of the range.
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True)
class Halving:
    """Of the trials that have trained for `smallest` epochs or steps one in `eta` goes on `eta` times as far, and so on
    up to `largest`."""

    smallest: int
    largest: int
    eta: int = 3
    unit: str = "epochs"

    def told(self, reach: int) -> str:
        """Return "1 epoch", "3 epochs": for texts."""
        return counted(reach, self.unit.removesuffix("s"))


@dataclass(frozen=True)
class Spec:
    """A sweep. `trials` None: all combinations; each is trained with `seeds` seeds, the median of which counts."""

    name: str
    method: str
    metric: str
    goal: str
    parameters: tuple[Parameter, ...]
    trials: int | None = None
    seed: int = 0
    seeds: int = 1
    timeout_seconds: int | None = None
    trainer: Flags = field(default_factory=dict)
    halving: Halving | None = None


def shipped() -> list[str]:
    """Return the names of the specs that come with the program."""
    return sorted(path.stem for path in _SPECS.glob("*.toml"))


def read_spec(named: str) -> tuple[Spec, str]:
    """Read the spec shipped under this name, or the file of this name, and return it and its text.

    The text names the sweep, also where it is called after its file. Raises ConfigError.
    """
    check_text(named, "SPEC")
    path = _SPECS / f"{named}.toml" if named in shipped() else Path(named)
    if not os.path.isfile(path):
        raise ConfigError(f"SPEC {named}: no such file; name a TOML file or one of {', '.join(shipped())}")
    values = load_toml(path, "SPEC")
    spec = parse_spec(path, values)
    text = path.read_text(encoding="utf-8")
    return spec, text if "name" in values else f'name = "{spec.name}"\n{text}'


def parse_spec(path: Path, values: Mapping[str, Any]) -> Spec:
    """Return the spec that stands in the file `path`. Raises ConfigError."""
    top = Table(path, "", values)
    method = top.take("method", one_of(METHODS))
    metric = top.take("metric", one_of(tuple(METRICS)), "test_accuracy")
    spec = Spec(
        name=top.take("name", folder_name, _default_name(path)),
        method=method,
        metric=metric,
        goal=top.take("goal", one_of(GOALS), METRICS[metric][0]),
        trials=top.take("trials", count, None),
        seed=top.take("seed", _whole, 0),
        seeds=top.take("seeds", count, 1),
        timeout_seconds=top.take("timeout_seconds", count, None),
        trainer=_trainer(top.table("trainer")),
        parameters=_parameters(top.table("parameters"), method),
        halving=_halving(top, method),
    )
    top.end()
    _check(top, spec)
    return spec


def _trainer(table: Table) -> Flags:
    found = {}
    for key, value in table.rest().items():
        each = _option(table, key)
        found[each.name] = each.check(value, table.where)
    return found


def _parameters(table: Table, method: str) -> tuple[Parameter, ...]:
    found: dict[str, Parameter] = {}
    for key, value in table.rest().items():
        each = _option(table, key)
        if each.name in found:
            raise table.fail(key, "stands there twice, with - and with _")
        if isinstance(value, dict):
            found[each.name] = _from_table(Table(table.path, f"parameters.{key}", value), each, method)
        elif isinstance(value, list):
            found[each.name] = Parameter(each.name, _values(table, key, each, value))
        else:
            raise table.fail(
                key, f"{quoted(value)} is one value: give a list, or a range such as {{low = 0.001, high = 1.0}}"
            )
    if not found:
        raise ConfigError(f"{table.path}: parameters: there are none: name what is to be tried")
    return tuple(found.values())


def _from_table(table: Table, each: Option, method: str) -> Parameter:
    values = table.take("values", lambda value: value, None)
    log = table.take("log", boolean, False)
    if values is not None:
        table.end()
        parameter = Parameter(each.name, _values(table, "values", each, values), log=log)
        if log and not all(type(value) in (int, float) and float(value) > 0 for value in parameter.values):
            raise table.fail("log", "only numbers above 0 have a logarithm")
        return parameter
    if each.kind not in (int, float):
        raise table.fail("values", f"is missing: --{each.name} is no number, so it has no range")
    low = each.check(table.take("low", _number), f"{table.where}.low")
    high = each.check(table.take("high", _number), f"{table.where}.high")
    integer = table.take("integer", boolean, each.kind is int)
    points = table.take("points", count, None)
    table.end()
    if low >= high:
        raise table.fail("high", f"{high} is not more than low, {low}")
    if log and low <= 0:
        raise table.fail("low", f"{low}: a logarithmic range begins above 0")
    if integer and not (float(low).is_integer() and float(high).is_integer()):
        raise table.fail("integer", f"{low} and {high} are not both whole numbers")
    if each.kind is int and not integer:
        raise table.fail("integer", f"--{each.name} takes whole numbers only")
    parameter = Parameter(each.name, (), low, high, log, integer)
    if points is not None:
        if points < 2:
            raise table.fail("points", f"{points}: at least 2, the ends of the range")
        return Parameter(each.name, parameter.spaced(points), low, high, log, integer)
    if method == "grid":
        raise table.fail("points", "is missing: a grid takes so many values of the range, or a list of them")
    return parameter


def _values(table: Table, key: str, each: Option, values: Any) -> tuple[Value, ...]:
    if not isinstance(values, list) or not values:
        raise table.fail(key, f"{quoted(values)} is not a list of values")
    checked = tuple(each.check(value, table.where) for value in values)
    if len(set(checked)) < len(checked):
        raise table.fail(key, "a value stands there twice")
    return checked


def _halving(top: Table, method: str) -> Halving | None:
    if method != "halving":
        return None
    table = top.table("halving")
    halving = Halving(
        table.take("smallest", count),
        table.take("largest", count),
        table.take("eta", count, Halving.eta),
        table.take("unit", one_of(_UNITS), Halving.unit),
    )
    table.end()
    if halving.eta < 2:
        raise table.fail("eta", f"{halving.eta}: at least 2; one trial in eta goes on")
    if halving.smallest >= halving.largest:
        raise table.fail("largest", f"{halving.largest} is not more than smallest, {halving.smallest}")
    return halving


def _check(top: Table, spec: Spec) -> None:
    """Raise ConfigError where parts of the spec contradict each other."""
    tried = {each.name: each for each in spec.parameters}
    given = {**spec.trainer, **tried}
    for name in spec.trainer:
        if name in tried:
            raise top.fail(f"trainer.{name}", "stands among the parameters too")
    if spec.seeds > 1 and "seed" in tried:
        raise top.fail("seeds", f"{spec.seeds}: the seed is one of the parameters already")
    if spec.metric.startswith("validation_") and "validation-fraction" not in given:
        raise top.fail("metric", f"{spec.metric}: no validation set; give validation-fraction, or another metric")
    sizes = math.prod(each.size for each in spec.parameters)
    if spec.method == "grid" and spec.trials is not None:
        raise top.fail("trials", 'a grid tries all combinations; with method = "random" so many')
    if spec.method == "random" and spec.trials is None:
        raise top.fail("trials", "is missing: how many combinations to try")
    if spec.trials is None and math.isinf(sizes):
        raise top.fail("trials", "is missing: ranges of real numbers have any number of combinations")
    if spec.trials is not None and spec.trials > sizes:
        combinations = counted(int(sizes), "combination")
        raise top.fail("trials", f"{spec.trials}: there are only {combinations} of the parameters")
    if spec.halving is None:
        return
    for name in _UNITS:
        if name in given:
            raise top.fail(
                f"{'trainer' if name in spec.trainer else 'parameters'}.{name}",
                "how far trials train is said by halving.largest",
            )
    if spec.metric not in _EVALUATED:
        raise top.fail(
            "metric", f"{spec.metric} is not known before the end of a run; halving takes {', '.join(_EVALUATED)}"
        )


def _option(table: Table, key: str) -> Option:
    name = key.replace("_", "-")
    if name in _OWN_FLAGS:
        raise table.fail(key, "the sweep sets it itself")
    if name not in _OPTIONS:
        raise table.fail(key, "is no flag of the trainer; python -m allreduce_sgd.train --help lists them")
    return _OPTIONS[name]


def _default_name(path: Path) -> str:
    try:
        return folder_name(path.stem)
    except ValueError:
        return "sweep"


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{quoted(value)} is not a whole number of at least 0")
    return value


def _number(value: Any) -> Any:
    if type(value) not in (int, float):
        raise ValueError(f"{quoted(value)} is not a number")
    return value
