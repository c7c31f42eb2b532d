"""What a study leaves behind: a file of JSON lines, the first of which tells how it was made, one for each run after.

Tuning runs are kept too (`phase`), since the budget spent on every cell is part of the claim. Numbers that a run did
not come to, because it missed the target, are null in the file and infinite here.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import inf, isinf
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from allreduce_sgd.durable import replace_file
from allreduce_sgd.errors import ConfigError, quoted
from allreduce_sgd.user_code import describe

__all__ = ["Cell", "Evaluation", "Phase", "ResultsFile", "Run", "Study", "fields_of", "read_study", "write_study"]

T = TypeVar("T")
Phase = Literal["tuning", "measured"]
_TASK = ("dataset", "model", "hidden", "target_accuracy", "epochs", "evaluate_every_samples", "trainer")
"""Of a spec, what all runs of a study have in common."""
_SPENT = ("seconds", "wall_seconds", "samples", "steps", "bytes")


@dataclass(frozen=True)
class Cell:
    """What is compared, but for the learning rate, which every cell chooses from its grid.

    `threads` are those of each rank. `network` is a rate between hosts of one rank each, such as "1gbit", or "none"
    for ranks of one machine. `flags` are further flags of the trainer, by name.
    """

    label: str
    contender: str
    strategy: str
    ranks: int
    threads: int
    global_batch_size: int
    algorithm: str = "auto"
    compression: str = "none"
    network: str = "none"
    flags: tuple[tuple[str, str | int | float | bool], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the whole test set; `bytes` were sent per rank up to then, None where that is not told."""

    steps: int
    samples: int
    train_seconds: float
    wall_seconds: float
    bytes: float | None
    test_accuracy: float
    test_loss: float | None


@dataclass(frozen=True)
class Run:
    """A training. What it took to reach the target (`seconds` to `bytes`) is infinite where it was not reached.

    `seconds` leave evaluation out, `wall_seconds` do not. `samples_per_second` and the two shares of communication
    are those of the whole run. `folder` is relative to the results' file; `noise_scale` is None unless measured;
    `commit` is that of the code which ran it, None where nobody noted it.
    """

    cell: Cell
    phase: Phase
    lr: float
    seed: int
    reached: bool
    seconds: float
    wall_seconds: float
    samples: float
    steps: float
    bytes: float | None
    samples_per_second: float
    communication_seconds: float | None
    exposed_communication_seconds: float | None
    train_seconds: float
    noise_scale: float | None
    folder: str
    evaluations: tuple[Evaluation, ...]
    commit: str | None = None

    @property
    def final_accuracy(self) -> float:
        return self.evaluations[-1].test_accuracy


@dataclass(frozen=True)
class Study:
    """The runs, and the file's first line: `head` has what every record of a benchmark has, and the `spec`."""

    head: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return str(self.head["spec"]["name"])

    @property
    def target_accuracy(self) -> float:
        return float(self.head["spec"]["target_accuracy"])


def fields_of(run: Run) -> dict[str, Any]:
    """Return the run as JSON has it, with the cell's fields beside its own."""
    entry: dict[str, Any] = asdict(run)
    cell: dict[str, Any] = entry.pop("cell")
    cell["flags"] = dict(cell["flags"])
    for name in _SPENT:
        if entry[name] is not None and isinf(entry[name]):
            entry[name] = None
    return {**cell, **entry}


def run_of(entry: Mapping[str, Any]) -> Run:
    """Return the run that a line of JSON stands for. Raises KeyError, TypeError or AttributeError where it is none."""
    values = dict(entry)
    cell = {name: values.pop(name) for name in Cell.__dataclass_fields__}
    cell["flags"] = tuple(cell["flags"].items())
    if not values["reached"]:
        values.update({name: inf for name in _SPENT if name != "bytes"})
        values["bytes"] = inf if any(each["bytes"] is not None for each in values["evaluations"]) else None
    values["evaluations"] = tuple(_checked(Evaluation(**each)) for each in values["evaluations"])
    return _checked(Run(cell=_checked(Cell(**cell)), **values))


def _checked(entry: T) -> T:
    """Return a dataclass's object whose fields hold what they say; raise TypeError where one does not."""
    for name, hint in get_type_hints(type(entry)).items():
        value = getattr(entry, name)
        if not any(_fits(value, each) for each in (get_args(hint) if isinstance(hint, UnionType) else (hint,))):
            raise TypeError(f"{name} is {quoted(value)}")
    return entry


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and value == value
    return type(value) is (get_origin(kind) or kind)


def write_study(path: Path, head: Mapping[str, Any], runs: Iterable[Run]) -> None:
    """Write the file anew, all or nothing."""
    lines = [head, *map(fields_of, runs)]
    replace_file(path, "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines))


def read_study(path: Path) -> Study:
    """Read a file of results. Raises ConfigError where it is not one."""
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        head = json.loads(first)
        study = Study(head, tuple(run_of(json.loads(line)) for line in rest))
        _ = study.name, study.target_accuracy
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        raise ConfigError(f"{path}: not the results of a study: {describe(problem)}") from problem
    return study


class ResultsFile:
    """The results of a study under way: the file has, at any time, all runs of this call and of earlier ones.

    Earlier runs stay until they are added anew, as long as they are of a cell and a rate in `rates`; measured ones of
    another rate than the cell has now are dropped, as two of a seed would count twice. Raises OSError where the file
    cannot be written, and ConfigError where it is no study, or one with runs of another task.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], rates: Mapping[Cell, Collection[float]]) -> None:
        self._path = path
        self._head = head
        self._runs: list[Run] = []
        try:
            earlier = read_study(path) if path.exists() else Study({}, ())
        except ConfigError as problem:
            raise ConfigError(f"--output: {problem}; remove it: finished runs are read from their folders") from problem
        self._earlier = [run for run in earlier.runs if run.lr in rates.get(run.cell, ())]
        if self._earlier:
            self._check_task(earlier.head["spec"])
        self._write()

    def add(self, run: Run) -> None:
        """Have this run in the file, which is written anew unless it has it already."""
        replaced = [each for each in self._earlier if _replaces(run, each)]
        self._earlier = [each for each in self._earlier if each not in replaced]
        self._runs.append(run)
        if replaced != [run]:
            self._write()

    def _check_task(self, earlier: Mapping[str, Any]) -> None:
        # As JSON has them.
        now = json.loads(json.dumps(self._head["spec"]))
        for name in _TASK:
            if earlier.get(name) != now.get(name):
                raise ConfigError(
                    f"--output: the runs in {self._path} have {name} = {earlier.get(name)}, not {now.get(name)}; name "
                    f"another folder"
                )

    def _write(self) -> None:
        write_study(self._path, self._head, [*self._runs, *self._earlier])


def _replaces(run: Run, earlier: Run) -> bool:
    """Say whether a run is the earlier one, or shows that its cell has another rate now."""
    other_rate = run.cell == earlier.cell and run.lr != earlier.lr
    return run.folder == earlier.folder or (run.phase == earlier.phase == "measured" and other_rate)
