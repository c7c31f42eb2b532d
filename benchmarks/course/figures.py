"""The figures of the course: which trainings each compares, and the rows that they make.

- batch, lr, momentum, optimizer: training loss against samples
- epoch_time: seconds of an epoch against batch size, for several numbers of ranks
- epochs_to_target: epochs to a test accuracy against batch size, with one learning rate for all batches, and with one
  in proportion to the batch (Goyal et al. 2017, arXiv 1706.02677, without their warm-up)
- noise_ball: see noise_ball.py; it trains no network
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.course.noise_ball import noise_ball
from benchmarks.course.runs import Course, Job, evaluations, training_losses

__all__ = ["FIGURES", "Figure", "timed_batch_sizes"]

Rows = list[dict[str, Any]]

_BATCH_SIZE = 64
_PLAIN = 0.1
"""Learning rate of SGD without momentum. Against Adam, momentum m has (1 - m) times that, so that steps are as long."""
_DIVERGED = 10.0
"""A loss beyond that tells no more than that there is none; guessing among ten classes has 2.3."""
_LOSS_BATCH_SIZES = (16, 64, 256)
_LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_MOMENTA = (0.0, 0.5, 0.9)
_ADAM = 0.001
_TIMED_BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_TARGET_BATCH_SIZES = (16, 64, 256, 1024, 4096)
_TIMED_EPOCHS = 2
_EVALUATIONS_PER_EPOCH = 4
_LONGER = 4
"""How many times longer than for the other figures a training may go on to reach the target."""
_CHAINS_PER_SEED = 2


@dataclass(frozen=True)
class Figure:
    """`jobs` are what it needs to be trained for every seed, `rows` what their folders make.

    `series` are the trainings of loss curves, by the names of their lines.
    """

    jobs: Callable[[Course], list[Job]]
    rows: Callable[[Course], Rows]
    series: Mapping[str, Job] = field(default_factory=dict)


def _sgd(lr: float, momentum: float = 0.0, batch_size: int = _BATCH_SIZE) -> Job:
    return Job(batch_size, (("optimizer", "sgd"), ("lr", lr), ("momentum", momentum)))


def _curves(name: str, title: str, jobs: Mapping[str, Job], note: str) -> Figure:
    def rows(course: Course) -> Rows:
        shared = {
            "figure": name,
            "title": title,
            "x_label": "training samples seen",
            "y_label": "training loss (nats)",
            "x_log": False,
            "y_log": True,
            "note": f"{note}; loss is the mean since the point before, ∞ above {_DIVERGED:g}; "
            "median and range over seeds",
        }
        return [{**shared, "series": series, **_curve(course, job)} for series, job in jobs.items()]

    return Figure(lambda course: list(jobs.values()), rows, jobs)


def _curve(course: Course, job: Job) -> dict[str, Any]:
    folders = course.folders(job)
    samples, losses = zip(*(training_losses(folder, course.interval_samples) for folder in folders), strict=True)
    points = [[loss if loss < _DIVERGED else inf for loss in values] for values in zip(*losses, strict=True)]
    return {"x": samples[0], **_spread(points), "n": len(folders), "runs": _names(folders)}


def _spread(points: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return median, lowest and highest of each point; JSON has no infinity, so None stands for it."""
    return {
        "y": [_or_none(statistics.median(values)) for values in points],
        "low": [_or_none(min(values)) for values in points],
        "high": [_or_none(max(values)) for values in points],
    }


def _or_none(value: float) -> float | None:
    return value if isfinite(value) else None


def _names(folders: Sequence[Path]) -> list[str]:
    return [str(folder) for folder in folders]


def _fitting(course: Course, batch_sizes: Sequence[int]) -> list[int]:
    """Return the batches of which an epoch has two or more."""
    return [batch for batch in batch_sizes if 2 * batch <= course.train_samples]


def _timed_job(batch_size: int, ranks: int) -> Job:
    return Job(batch_size, (*_sgd(_PLAIN).flags, ("epochs", _TIMED_EPOCHS)), ranks)


def _epoch_times(course: Course) -> Rows:
    cores = len(os.sched_getaffinity(0))
    rows = []
    for ranks in course.ranks:
        jobs = [_timed_job(batch, ranks) for batch in timed_batch_sizes(course, ranks)]
        folders = [course.folders(job) for job in jobs]
        points = [[_seconds_of_last_epoch(folder) for folder in each] for each in folders]
        told = f"{ranks} rank{'s' if ranks > 1 else ''}"
        rows.append(
            {
                "figure": "epoch_time",
                "title": "Time of an epoch",
                "series": told if ranks <= cores else f"{told} on {cores} core{'s' if cores > 1 else ''}",
                "x": [job.batch_size for job in jobs],
                **_spread(points),
                "x_label": "mini-batch of all ranks (samples)",
                "y_label": "time of an epoch (s)",
                "n": course.seeds,
                "x_log": True,
                "y_log": True,
                "note": "the second epoch, without evaluation, one thread per rank; median and range over runs",
                "runs": [name for each in folders for name in _names(each)],
            }
        )
    return rows


def timed_batch_sizes(course: Course, ranks: int) -> list[int]:
    """Return the mini-batches of epoch_time that have a sample for each of so many ranks."""
    return [batch for batch in _fitting(course, _TIMED_BATCH_SIZES) if batch >= ranks]


def _seconds_of_last_epoch(folder: Path) -> float:
    before, after = (each["train_seconds"] for each in evaluations(folder))
    return float(after - before)


def _target_rules() -> dict[str, Callable[[int], float]]:
    return {
        f"η = {_PLAIN:g}": lambda batch: _PLAIN,
        f"η = {_PLAIN:g} · B / {_BATCH_SIZE}": lambda batch: _PLAIN * batch / _BATCH_SIZE,
    }


def _target_job(course: Course, batch_size: int, lr: float) -> Job:
    # At the same samples for all batches, each of which divides the largest.
    largest = max(_fitting(course, _TARGET_BATCH_SIZES))
    samples_between = largest * max(1, round(course.train_samples / _EVALUATIONS_PER_EPOCH / largest))
    return Job(
        batch_size,
        (
            *_sgd(lr).flags,
            ("epochs", _LONGER * course.epochs),
            ("target-accuracy", course.target_accuracy),
            ("evaluate-every", samples_between // batch_size),
        ),
    )


def _target_jobs(course: Course) -> list[Job]:
    batches = _fitting(course, _TARGET_BATCH_SIZES)
    return [_target_job(course, batch, lr(batch)) for lr in _target_rules().values() for batch in batches]


def _epochs_to_target(course: Course) -> Rows:
    rows = []
    missed = []
    for series, lr in _target_rules().items():
        jobs = [_target_job(course, batch, lr(batch)) for batch in _fitting(course, _TARGET_BATCH_SIZES)]
        folders = [course.folders(job) for job in jobs]
        points = [[_epochs_of(folder, course.target_accuracy) for folder in each] for each in folders]
        for job, epochs in zip(jobs, points, strict=True):
            if inf in epochs:
                missed.append(f"{epochs.count(inf)} of {len(epochs)} with {series}, batch {job.batch_size}")
        rows.append(
            {
                "figure": "epochs_to_target",
                "title": f"Epochs to {100 * course.target_accuracy:g} % test accuracy",
                "series": series,
                "x": [job.batch_size for job in jobs],
                **_spread(points),
                "x_label": "mini-batch B (samples)",
                "y_label": "epochs to the target",
                "n": course.seeds,
                "x_log": True,
                "y_log": True,
                "runs": [name for each in folders for name in _names(each)],
            }
        )
    note = f"SGD without momentum; median and range over seeds; ∞: not reached in {_LONGER * course.epochs} epochs"
    told = f"{note}, by {'; '.join(missed) or 'none'}"
    return [{**row, "note": told} for row in rows]


def _epochs_of(folder: Path, target_accuracy: float) -> float:
    for each in evaluations(folder):
        accuracy = nan if each["test_accuracy"] is None else each["test_accuracy"]
        if accuracy >= target_accuracy:
            return float(each["epoch"])
    return inf


FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "batch": _curves(
            "batch",
            "Training loss by mini-batch",
            {f"batch {batch}": _sgd(_PLAIN, batch_size=batch) for batch in _LOSS_BATCH_SIZES},
            f"SGD, learning rate {_PLAIN:g}, no momentum",
        ),
        "lr": _curves(
            "lr",
            "Training loss by learning rate",
            {f"η = {lr:g}": _sgd(lr) for lr in _LEARNING_RATES},
            f"SGD, batch {_BATCH_SIZE}, no momentum",
        ),
        "momentum": _curves(
            "momentum",
            "Training loss by momentum",
            {f"momentum {momentum:g}": _sgd(_PLAIN / 10, momentum) for momentum in _MOMENTA},
            f"SGD, batch {_BATCH_SIZE}, learning rate {_PLAIN / 10:g}",
        ),
        "optimizer": _curves(
            "optimizer",
            "Training loss: SGD against Adam",
            {
                f"SGD, η = {_PLAIN:g}": _sgd(_PLAIN),
                f"SGD, momentum 0.9, η = {_PLAIN / 10:g}": _sgd(_PLAIN / 10, 0.9),
                f"Adam, η = {_ADAM:g}": Job(_BATCH_SIZE, (("optimizer", "adam"), ("lr", _ADAM))),
            },
            f"batch {_BATCH_SIZE}",
        ),
        "epoch_time": Figure(
            lambda course: [
                _timed_job(batch, ranks) for ranks in course.ranks for batch in timed_batch_sizes(course, ranks)
            ],
            _epoch_times,
        ),
        "epochs_to_target": Figure(_target_jobs, _epochs_to_target),
        "noise_ball": Figure(lambda course: [], lambda course: noise_ball(max(2, _CHAINS_PER_SEED * course.seeds))),
    }
)
