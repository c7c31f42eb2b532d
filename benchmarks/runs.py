"""Training runs as subprocesses, exactly as a user starts them, and what their files tell about the target.

A run's folder appears under its final name only when the run has ended well, so that a benchmark that was interrupted
goes on where it stopped; what an interrupted run left behind is dropped.
"""

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.strategies.options import LOCAL

__all__ = [
    "Cell",
    "Evaluation",
    "Outcome",
    "RunFailed",
    "Task",
    "bytes_per_step",
    "check_same",
    "find_mpirun",
    "outcome_of",
    "train",
]

_MOMENTUM = 0.9
_ENDING_SECONDS = 10
_CONFIG_STATUS = 2


@dataclass(frozen=True)
class Cell:
    """What differs between the runs that are compared; `threads` are those of each rank."""

    contender: str
    strategy: str
    ranks: int
    threads: int
    global_batch_size: int
    lr: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the whole test set."""

    steps: int
    samples: int
    train_seconds: float
    wall_seconds: float
    test_accuracy: float


@dataclass(frozen=True)
class Outcome:
    """A run; what it took to reach the target is infinite where it was not reached.

    `sent_bytes` is the mean over ranks, None where the back end does not tell; `samples_per_second` is that of the
    whole run without evaluation.
    """

    cell: Cell
    seed: int
    reached: bool
    seconds: float
    wall_seconds: float
    samples: float
    steps: float
    sent_bytes: float | None
    samples_per_second: float
    evaluations: tuple[Evaluation, ...]


class RunFailed(Exception):
    """A run ended with an error or passed its deadline; the text has what it said."""


@dataclass(frozen=True)
class Task:
    """What all cells share. Everything that a run depends on is given to it explicitly, no default is relied upon."""

    dataset: str
    data_dir: Path | None
    model: str
    hidden: str
    period: int
    target_accuracy: float
    epochs: int
    evaluate_every_samples: int
    timeout_seconds: int
    output: Path

    def run(self, cell: Cell, seed: int) -> Outcome:
        """Train, unless a finished run is there. Raises RunFailed, and ConfigError where the run refuses its flags."""
        folder = self.output / (
            f"{cell.contender}-{cell.strategy}-p{cell.ranks}-t{cell.threads}-b{cell.global_batch_size}"
            f"-lr{cell.lr:g}-seed{seed}"
        )
        flags = self._flags(cell, seed)
        if folder.exists():
            check_same(folder, flags)
        else:
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            train(cell.ranks, {**flags, **self._places(unfinished)}, self.timeout_seconds)
            unfinished.rename(folder)
        return outcome_of(folder, cell, seed, self.target_accuracy)

    def _flags(self, cell: Cell, seed: int) -> dict[str, str | int | float]:
        evaluate_every_steps = self.evaluate_every_samples // cell.global_batch_size
        period = {"period": self.period} if cell.strategy in LOCAL else {}
        return {
            "dataset": self.dataset,
            "model": self.model,
            "hidden": self.hidden,
            "strategy": cell.strategy,
            **period,
            "optimizer": "sgd",
            "momentum": _MOMENTUM,
            "lr": cell.lr,
            "global-batch-size": cell.global_batch_size,
            "epochs": self.epochs,
            "target-accuracy": self.target_accuracy,
            "evaluate-every": evaluate_every_steps,
            # Logging costs a small all-reduce: as often, in samples, for every cell.
            "log-every": evaluate_every_steps,
            "seed": seed,
            "threads": cell.threads,
            "device": "cpu",
        }

    def _places(self, output: Path) -> dict[str, str | int | float]:
        places: dict[str, str | int | float] = {"output": str(output)}
        return places if self.data_dir is None else {**places, "data-dir": str(self.data_dir)}


def train(ranks: int, flags: Mapping[str, str | int | float], timeout_seconds: int) -> None:
    """Run a training with these flags, of which True stands for one without a value.

    Raises RunFailed, and ConfigError where it refuses the flags.
    """
    launcher = [] if ranks == 1 else [*find_mpirun(), "-np", str(ranks)]
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    _execute([*launcher, sys.executable, "-m", "allreduce_sgd.train", *words], timeout_seconds)


def bytes_per_step(summaries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median over runs of the bytes sent per rank and step; None where the back end does not tell."""
    known = [run["communication_bytes"] / run["steps"] for run in summaries if run["communication_bytes"] is not None]
    return statistics.median(known) if known else None


def find_mpirun() -> list[str]:
    """Return the command that starts ranks: $MPIRUN, or mpirun or mpiexec beside this Python, or on the PATH."""
    named = shlex.split(os.environ.get("MPIRUN", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise ConfigError(f"$MPIRUN: {named[0]} is not a program that can be run")
        return named
    for place in (str(Path(sys.executable).parent), None):
        for name in ("mpirun", "mpiexec"):
            found = shutil.which(name, path=place)
            if found is not None:
                return [found]
    raise ConfigError("no mpirun or mpiexec beside this Python or on the PATH; name one in $MPIRUN")


def outcome_of(folder: Path, cell: Cell, seed: int, target_accuracy: float) -> Outcome:
    """Read what the run in `folder` took to reach the target accuracy."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    evaluations = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["event"] == "evaluation":
            if entry["test_accuracy"] is None:
                raise ConfigError(f"--dataset: a run on it ({folder}) has no test accuracy to reach")
            evaluations.append(
                Evaluation(
                    entry["step"],
                    entry["samples"],
                    entry["train_seconds"],
                    entry["wall_seconds"],
                    entry["test_accuracy"],
                )
            )
    hit = next((each for each in evaluations if each.test_accuracy >= target_accuracy), None)
    sent: float | None = summary["communication_bytes"]
    return Outcome(
        cell=cell,
        seed=seed,
        reached=hit is not None,
        seconds=inf if hit is None else hit.train_seconds,
        wall_seconds=inf if hit is None else hit.wall_seconds,
        samples=inf if hit is None else hit.samples,
        steps=inf if hit is None else hit.steps,
        # The run stops at the target, so what it sent in all is what it sent to get there.
        sent_bytes=inf if hit is None and sent is not None else sent,
        samples_per_second=summary["samples_per_second"],
        evaluations=tuple(evaluations),
    )


def check_same(folder: Path, flags: Mapping[str, str | int | float]) -> None:
    """Raise ConfigError where the finished run in `folder` had other flags than these."""
    try:
        had: dict[str, Any] = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError(f"--output: {folder} is there, but is not the folder of a run: {problem}") from problem
    for flag, given in flags.items():
        name, value = (flag.removeprefix("no-"), False) if flag not in had and given is True else (flag, given)
        if had.get(name) != value:
            raise ConfigError(
                f"--output: the run in {folder} has --{name} {had.get(name)}, not {value}; name another folder"
            )


def _execute(command: Sequence[str], timeout_seconds: int) -> None:
    said = shlex.join(command)
    # A session of its own, so that the launcher and whatever it starts can be ended together.
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            raise RunFailed(f"not finished after {timeout_seconds} s: {said}") from None
        except BaseException:
            _end(process)
            raise
    if process.returncode == _CONFIG_STATUS:
        raise ConfigError(errors.strip().removeprefix("allreduce-sgd: error: "))
    if process.returncode != 0:
        raise RunFailed(f"ended with status {process.returncode}: {said}\n{errors.strip()}")


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
