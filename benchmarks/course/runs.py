"""Trainings that the pictures are drawn from: what they have in common, which there are already, what they logged.

A run's folder is named after all that sets the run apart, so that pictures share runs, and appears under its name only
when the run has ended well: a course that was interrupted goes on where it stopped.
"""

import json
import re
import shutil
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

from benchmarks.runs import check_same, train

__all__ = ["Course", "Job", "entries", "evaluations", "training_losses"]

_LOGGED_PER_EPOCH = 8
_LARGEST_LOGGED_BATCH = 256
_NEARLY = 0.9


@dataclass(frozen=True)
class Job:
    """One of the trainings compared, but for the seed: `flags` are those of the trainer, beside what all have."""

    batch_size: int
    flags: tuple[tuple[str, str | int | float], ...]
    ranks: int = 1

    @property
    def name(self) -> str:
        words = [f"p{self.ranks}", f"b{self.batch_size}", *(f"{flag}-{value}" for flag, value in self.flags)]
        return re.sub(r"[^a-z0-9.-]+", "-", "-".join(words).lower())


@dataclass(frozen=True)
class Course:
    """What all trainings have in common. Loss is logged, and accuracy measured, at the same samples for all batches."""

    dataset: str
    data_dir: Path | None
    train_samples: int
    hidden: str
    target_accuracy: float
    epochs: int
    seeds: int
    ranks: tuple[int, ...]
    timeout_seconds: int
    output: Path

    @property
    def interval_samples(self) -> int:
        """About how many samples are between two points of a loss curve."""
        return _LARGEST_LOGGED_BATCH * max(1, self.train_samples // _LOGGED_PER_EPOCH // _LARGEST_LOGGED_BATCH)

    @property
    def fewest_samples(self) -> int:
        """How many samples a loss curve needs for its first point."""
        return ceil(_NEARLY * self.interval_samples)

    def folder(self, job: Job, seed: int) -> Path:
        return self.output / f"{job.name}-seed{seed}"

    def folders(self, job: Job) -> list[Path]:
        return [self.folder(job, seed) for seed in range(self.seeds)]

    def flags(self, job: Job, seed: int) -> dict[str, str | int | float]:
        """Return the trainer's flags, but for the run's folder."""
        flags: dict[str, str | int | float] = {
            "dataset": self.dataset,
            "model": "mlp",
            "hidden": self.hidden,
            "epochs": self.epochs,
            "global-batch-size": job.batch_size,
            "log-every": max(1, self.interval_samples // job.batch_size),
            "threads": 1,
            "device": "cpu",
            "seed": seed,
            **dict(job.flags),
        }
        if self.data_dir is not None:
            flags["data-dir"] = str(self.data_dir)
        return flags

    def run(self, job: Job, seed: int) -> None:
        """Train, unless a finished run is there. Raises RunFailed, and ConfigError where the run refuses its flags."""
        folder, flags = self.folder(job, seed), self.flags(job, seed)
        if folder.exists():
            check_same(folder, flags)
            return
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        train(job.ranks, {**flags, "output": str(unfinished)}, self.timeout_seconds)
        unfinished.rename(folder)


def training_losses(folder: Path, interval_samples: int) -> tuple[list[int], list[float]]:
    """Return samples trained on, and the mean loss since the point before, infinite where it is not a number.

    The trainer logs at the end of an epoch too; a point takes in what it logged for about `interval_samples`.
    """
    places: list[int] = []
    means: list[float] = []
    reached, total = 0, 0.0
    for each in (entry for entry in entries(folder) if entry["event"] == "train"):
        total += (inf if each["loss"] is None else each["loss"]) * (each["samples"] - reached)
        reached = each["samples"]
        since = reached - (places[-1] if places else 0)
        if since >= _NEARLY * interval_samples:
            places.append(reached)
            means.append(total / since)
            total = 0.0
    return places, means


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in entries(folder) if entry["event"] == "evaluation"]


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
