"""The description of a study: a TOML file, every mistake in which is one line that names the file and the key.

Top level: what is trained, to which accuracy, and how it is measured. [trainer]: further flags of the trainer for all
cells. [tuning]: the learning rates that every cell chooses from. [grid]: the methods, of which every combination is a
cell. [baselines]: what they are compared with. The specs in `specs/` are examples.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allreduce_sgd.comm.options import ALGORITHMS
from allreduce_sgd.compression.options import CODECS
from allreduce_sgd.config import check_text, options
from allreduce_sgd.errors import ConfigError, counted, quoted
from allreduce_sgd.strategies.options import STRATEGIES
from allreduce_sgd.toml_file import load_toml
from allreduce_sgd.toml_table import (
    Table,
    boolean,
    count,
    folder_name,
    fraction,
    list_of,
    mapping,
    one_of,
    positive,
    text,
)
from benchmarks.runs import Flags

__all__ = ["SCALINGS", "Baselines", "Grid", "Spec", "StrategyEntry", "Tuning", "read_spec", "shipped"]

SCALINGS = ("linear", "sqrt", "none")
_SPECS = Path(__file__).parent / "specs"
_OPTIONS = {each.name: each for each in options()}
_RATE = re.compile(r"[0-9]+(\.[0-9]+)?[kmg]?bit")
# What the study itself gives to every run.
_OWN_FLAGS = frozenset(
    "algorithm batch-size checkpoint-every compression data-dir dataset epochs evaluate-every full-batch "
    "global-batch-size hidden log-every lr model noise-scale output pause-after-epochs pause-after-steps resume seed "
    "steps strategy target-accuracy target-loss tensorboard threads trace".split()
)


@dataclass(frozen=True)
class StrategyEntry:
    """A method of the grid: its name for the trainer, its flags, and what tables call it."""

    name: str
    label: str
    flags: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """The learning rates `lr`, for updates from `batch_size` samples (None: for all), and how many seeds try them."""

    lr: tuple[float, ...]
    batch_size: int | None = None
    scaling: str = "none"
    seeds: int = 1

    def rates(self, update_samples: int) -> tuple[float, ...]:
        """Return the rates to choose from where an update is made from so many samples."""
        ratio = 1.0 if self.batch_size is None else update_samples / self.batch_size
        factor = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.scaling]
        # Rounded, so that rates have short names.
        return tuple(float(f"{rate * factor:.6g}") for rate in self.lr)


@dataclass(frozen=True)
class Grid:
    ranks: tuple[int, ...] = ()
    strategies: tuple[StrategyEntry, ...] = ()
    global_batch_sizes: tuple[int, ...] = ()
    algorithms: tuple[str, ...] = ("auto",)
    compressions: tuple[str, ...] = ("none",)
    networks: tuple[str, ...] = ("none",)


@dataclass(frozen=True)
class Baselines:
    """Serial SGD with these mini-batches; one rank with all cores, and torch's DDP, with those of the grid.

    `serial_lr` are the rates of serial mini-batches that are too far from `Tuning.batch_size` for its scaling.
    """

    serial_batches: tuple[int, ...] = ()
    serial_lr: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    all_cores: bool = False
    torch_ddp: bool = False


@dataclass(frozen=True)
class Spec:
    """A study. `trainer` are flags for all runs; `epochs` is where a run ends that misses the target."""

    name: str
    dataset: str
    model: str
    target_accuracy: float
    epochs: int
    evaluate_every_samples: int
    tuning: Tuning
    hidden: str | None = None
    seeds: int = 5
    timeout_seconds: int = 900
    noise_scale: bool = False
    trainer: Flags = field(default_factory=dict)
    grid: Grid = Grid()
    baselines: Baselines = Baselines()


def shipped() -> list[str]:
    """Return the names of the specs that come with the program."""
    return sorted(path.stem for path in _SPECS.glob("*.toml"))


def read_spec(named: str) -> Spec:
    """Read the spec shipped under this name, or the file of this name. Raises ConfigError."""
    check_text(named, "SPEC")
    path = _SPECS / f"{named}.toml" if named in shipped() else Path(named)
    if not os.path.isfile(path):
        raise ConfigError(f"SPEC {named}: no such file; name a TOML file or one of {', '.join(shipped())}")
    return _spec(Table(path, "", load_toml(path, "SPEC")))


def _spec(top: Table) -> Spec:
    trainer, tuning, grid, baselines = (top.table(key) for key in ("trainer", "tuning", "grid", "baselines"))
    spec = Spec(
        name=top.take("name", folder_name),
        dataset=top.take("dataset", text),
        model=top.take("model", text),
        target_accuracy=top.take("target_accuracy", fraction),
        epochs=top.take("epochs", count),
        evaluate_every_samples=top.take("evaluate_every_samples", count),
        hidden=top.take("hidden", text, None),
        seeds=top.take("seeds", count, Spec.seeds),
        timeout_seconds=top.take("timeout_seconds", count, Spec.timeout_seconds),
        noise_scale=top.take("noise_scale", boolean, Spec.noise_scale),
        trainer=_flags(trainer),
        tuning=_tuning(tuning),
        grid=_grid(grid),
        baselines=_baselines(baselines),
    )
    top.end()
    needed = len(spec.tuning.lr)
    for batch, rates in spec.baselines.serial_lr.items():
        if len(rates) != needed:
            told = f"{counted(len(rates), 'rate')} for batch {batch}, but {needed} in [tuning]; every cell has as many"
            raise baselines.fail("serial_batches", told)
    batches = {*spec.baselines.serial_batches, *spec.grid.global_batch_sizes}
    for batch in sorted(batches):
        if spec.evaluate_every_samples % batch:
            raise top.fail(
                "evaluate_every_samples", f"{spec.evaluate_every_samples} is not a multiple of the mini-batch {batch}"
            )
    return spec


def _tuning(table: Table) -> Tuning:
    batch_size = table.take("batch_size", count, None)
    tuning = Tuning(
        table.take("lr", _ascending),
        batch_size,
        table.take("scaling", one_of(SCALINGS), "none"),
        table.take("seeds", count, 1),
    )
    table.end()
    if (batch_size is None) != (tuning.scaling == "none"):
        raise table.fail("batch_size", 'the mini-batch that lr is given for; with scaling "linear" or "sqrt" only')
    return tuning


def _ascending(value: Any) -> tuple[float, ...]:
    rates = list_of(positive)(value)
    if not rates or list(rates) != sorted(set(rates)):
        raise ValueError("give the rates in ascending order, at least one")
    return rates


def _baselines(table: Table) -> Baselines:
    entries: tuple[dict[str, Any], ...] = table.take("serial_batches", list_of(_serial_values), ())
    serial_lr: dict[int, tuple[float, ...]] = {}
    batches = []
    for index, values in enumerate(entries):
        entry = Table(table.path, f"baselines.serial_batches[{index}]", values)
        batches.append(entry.take("batch", count))
        rates = entry.take("lr", _ascending, None)
        entry.end()
        if rates is not None:
            serial_lr[batches[-1]] = rates
    baselines = Baselines(
        tuple(batches),
        serial_lr,
        table.take("all_cores", boolean, False),
        table.take("torch_ddp", boolean, False),
    )
    table.end()
    return baselines


def _grid(table: Table) -> Grid:
    strategies: tuple[dict[str, Any], ...] = table.take("strategies", list_of(_strategy_values), ())
    grid = Grid(
        table.take("ranks", list_of(_several), ()),
        tuple(_strategy(table, index, values) for index, values in enumerate(strategies)),
        table.take("global_batch_sizes", list_of(count), ()),
        table.take("algorithms", list_of(one_of(ALGORITHMS)), ("auto",)),
        table.take("compressions", list_of(one_of(CODECS)), ("none",)),
        table.take("networks", list_of(_network), ("none",)),
    )
    table.end()
    return grid


def _strategy(grid: Table, index: int, values: Mapping[str, Any]) -> StrategyEntry:
    table = Table(grid.path, f"grid.strategies[{index}]", values)
    name = table.take("name", one_of(STRATEGIES))
    label = table.take("label", text, None)
    flags = _flags(table.table("flags"))
    table.end()
    told = [name, *(f"{flag} {value}" for flag, value in flags.items())]
    return StrategyEntry(name, label or ", ".join(told), flags)


def _flags(table: Table) -> Flags:
    """Return all entries that are left as flags of the trainer."""
    found = {}
    for key, value in table.rest().items():
        name = key.replace("_", "-")
        if name in _OWN_FLAGS or name not in _OPTIONS:
            raise table.fail(key, "the study sets it itself" if name in _OWN_FLAGS else "is no flag of the trainer")
        found[name] = _OPTIONS[name].check(value, table.where)
    return found


def _several(value: Any) -> int:
    if count(value) < 2:
        raise ValueError(f"{value}: at least 2; one rank alone is among the baselines")
    return int(value)


def _serial_values(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"batch": count(value)}


def _strategy_values(value: Any) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else mapping(value)


def _network(value: Any) -> str:
    if value != "none" and not _RATE.fullmatch(str(value)):
        raise ValueError(f'{quoted(value)} is neither "none" nor a rate such as "1gbit"')
    return str(value)
