"""Who sets the flags of a training: the spec, the trial, and how far it is to go in this rung of halving."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allreduce_sgd.command_line import words
from allreduce_sgd.config import config_from
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.sweep.search import Trial
from allreduce_sgd.sweep.spec import Spec, Value

__all__ = [
    "Job",
    "arguments_of",
    "check_flags",
    "flags_of",
    "folder_of",
    "has_summary",
    "log_of",
    "seeds_of",
    "value_of",
]

TRIALS = "trials"


@dataclass(frozen=True)
class Job:
    """A training of `trial` with `seed`, up to `reach` epochs or steps in all; None without halving: to its end."""

    trial: Trial
    seed: int
    reach: int | None = None
    before: int = 0
    """What of `reach` it has come to in the rung before."""

    @property
    def units(self) -> int:
        """How much there is to do, as compared with others of this sweep."""
        return 1 if self.reach is None else self.reach - self.before


def flags_of(spec: Spec, trial: Trial, seed: int) -> dict[str, Value]:
    """Return the flags of the whole training, from which halving takes the first part."""
    flags: dict[str, Value] = {**spec.trainer, **trial.parameters}
    if spec.seeds > 1:
        flags["seed"] = seed
    if spec.halving is not None:
        flags[spec.halving.unit] = spec.halving.largest
    # One is enough to go on, and those of many trials fill a disk.
    flags.setdefault("keep-checkpoints", 1)
    return flags


def seeds_of(spec: Spec, trial: Trial) -> tuple[int, ...]:
    """Return the values of --seed that a trial is trained with: from the spec's or the trainer's own on."""
    first = int({**spec.trainer, **trial.parameters}.get("seed", 0))
    return tuple(range(first, first + spec.seeds))


def check_flags(spec: Spec, trial: Trial) -> str | None:
    """Return why the trainer refuses the trial, as far as it tells by its flags; None where it does not."""
    try:
        config_from(flags_of(spec, trial, seeds_of(spec, trial)[0]))
    except ConfigError as problem:
        return str(problem)
    return None


def folder_of(output: Path, spec: Spec, trial: int, seed: int) -> Path:
    """Return the folder of a training within that of the sweep."""
    folder = output / TRIALS / f"{trial:03d}"
    return folder if spec.seeds == 1 else folder / f"seed-{seed}"


def log_of(folder: Path) -> Path:
    """Return the file of what a training says, beside its folder."""
    return folder.with_name(f"{folder.name}.log")


def arguments_of(output: Path, spec: Spec, job: Job) -> list[str]:
    """Return the trainer's arguments: from the checkpoint that the training has, or afresh, in an empty folder."""
    folder = folder_of(output, spec, job.trial.number, job.seed)
    flags: dict[str, Value] = {}
    if (folder / "checkpoints" / "latest").exists():
        flags["resume"] = str(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        flags = {**flags_of(spec, job.trial, job.seed), "output": str(folder)}
    if spec.halving is not None and job.reach != spec.halving.largest:
        assert job.reach is not None
        flags[f"pause-after-{spec.halving.unit}"] = job.reach
    return words(flags)


def has_summary(output: Path, spec: Spec, job: Job) -> bool:
    """Say whether the training has come to an end of its own: the last step, a target."""
    return _summary(folder_of(output, spec, job.trial.number, job.seed)) is not None


def value_of(output: Path, spec: Spec, job: Job) -> float | None:
    """Return the metric of a training that has come to its end, or to `reach`; None where it has not.

    Raises ValueError, saying why, where it has no such figure, or one that is no number.
    """
    folder = folder_of(output, spec, job.trial.number, job.seed)
    figures = _summary(folder)
    if figures is None and spec.halving is not None and job.reach is not None:
        position = "step" if spec.halving.unit == "steps" else "epoch"
        evaluation = _last_evaluation(folder)
        if evaluation is not None and evaluation[position] >= job.reach:
            figures = evaluation
    if figures is None:
        return None
    value = figures.get(spec.metric)
    if value is None:
        known = spec.metric in figures
        raise ValueError(f"{spec.metric} is {'not a finite number' if known else 'none of the figures of its summary'}")
    return float(value)


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _last_evaluation(folder: Path) -> dict[str, Any] | None:
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    for line in reversed(lines):
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == "evaluation":
            return entry
    return None
