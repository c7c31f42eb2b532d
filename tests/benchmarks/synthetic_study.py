"""A study made up from a formula, for the tests of the report: nothing in it was measured."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.results import Cell, Evaluation, Run, write_study

TARGET = 0.88
SEEDS = range(5)
RATES = (0.02, 0.05, 0.1, 0.2, 0.5)
HEAD: dict[str, Any] = {
    "benchmark": "time_to_accuracy",
    "command": "python -m benchmarks.time_to_accuracy made-up.toml",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "machine": {
        "processor": "Made-up CPU",
        "cores": 2,
        "memory_bytes": 8 * 2**30,
        "system": "Linux",
        "load_average": [2.0, 1.5, 1.0],
    },
    "versions": {"python": "3.11.7", "torch": "2.13.0", "mpi": None},
    "spec": {
        "name": "made-up",
        "dataset": "fashion-mnist",
        "model": "mlp",
        "target_accuracy": TARGET,
        "evaluate_every": 12_000,
    },
}
CELLS = (
    Cell("serial, batch 1", "serial", "serial", 1, 1, 1),
    Cell("serial, batch 16", "serial", "serial", 1, 1, 16),
    Cell("serial, batch 64", "serial", "serial", 1, 1, 64),
    Cell("one rank, 2 threads, batch 64", "one_rank_all_cores", "serial", 1, 2, 64),
    Cell("sync, 2 ranks, batch 64", "allreduce_sgd", "sync", 2, 1, 64),
    Cell("sync, 2 ranks, batch 256", "allreduce_sgd", "sync", 2, 1, 256),
    Cell("local, period 8, 2 ranks, batch 32", "allreduce_sgd", "local", 2, 1, 32, flags=(("period", 8),)),
    Cell("torch DDP over Gloo, 2 ranks, batch 64", "torch_ddp_gloo", "sync", 2, 1, 64),
)
SPEEDS = (2_500.0, 16_000.0, 24_000.0, 27_000.0, 40_000.0, 55_000.0, 36_000.0, 21_000.0)
"""Samples per second of each cell."""
SAMPLES = (150_000.0, 160_000.0, 190_000.0, 190_000.0, 190_000.0, 340_000.0, 165_000.0, 190_000.0)
"""By which a cell approaches its final accuracy; those of serial and synchronous cells grow with the batch."""


def make_run(cell: Cell, place: int, seed: int, *, lr: float = 0.1, reaches: bool = True, end: float = TARGET) -> Run:
    """Return a run whose accuracy approaches 0.9 (0.879 where it misses) along an exponential, with some noise."""
    noise = np.random.default_rng([place, seed])
    speed = SPEEDS[place] * noise.uniform(0.96, 1.04)
    needed = SAMPLES[place] * noise.uniform(0.93, 1.07)
    best = 0.9 if reaches else 0.8795
    communicates = cell.ranks > 1
    evaluations: list[Evaluation] = []
    for count in range(1, 101):
        samples = 12_000 * count
        accuracy = best - 0.45 * np.exp(-samples / needed) + noise.normal(0, 0.0007)
        accuracy = float(accuracy if reaches else min(accuracy, TARGET - 0.0005))
        seconds = samples / speed
        steps = samples // cell.global_batch_size
        sent = (2.68e6 * steps / (8 if cell.strategy == "local" else 1)) if communicates else 0.0
        told = None if cell.contender == "torch_ddp_gloo" else sent
        evaluations.append(
            Evaluation(
                steps, samples, seconds, seconds + 0.05 * count, told, round(accuracy, 4), round(1 - accuracy, 4)
            )
        )
        if accuracy >= end:
            break
    last = evaluations[-1]
    reached = last.test_accuracy >= TARGET
    train_seconds = last.train_seconds
    waiting = None if cell.contender == "torch_ddp_gloo" else (0.08 * train_seconds if communicates else 0.0)
    return Run(
        cell,
        "measured",
        lr,
        seed,
        reached,
        last.train_seconds if reached else inf,
        last.wall_seconds if reached else inf,
        last.samples if reached else inf,
        last.steps if reached else inf,
        last.bytes if reached or last.bytes is None else inf,
        speed,
        None if waiting is None else 2 * waiting,
        waiting,
        train_seconds,
        180.0 * float(noise.uniform(0.8, 1.25)) if communicates and cell.strategy == "sync" else None,
        f"runs/{place}-seed{seed}-lr{lr:g}",
        tuple(evaluations),
    )


def study_runs(cells: Sequence[Cell] = CELLS) -> list[Run]:
    """Every cell tuned with two seeds of each rate and measured with five; one run of local SGD misses."""
    runs = []
    for place, cell in enumerate(cells):
        for lr in RATES:
            for seed in (1000, 1001):
                tuning = make_run(cell, place, seed, lr=lr)
                runs.append(replace(tuning, phase="tuning", evaluations=tuning.evaluations[-1:]))
        for seed in SEEDS:
            runs.append(make_run(cell, place, seed, reaches=not (cell.strategy == "local" and seed == 3)))
    return runs


def write_synthetic_study(folder: Path, runs: Sequence[Run] | None = None, **spec: Any) -> Path:
    """Write the study's folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {**HEAD, "spec": {**HEAD["spec"], **spec}}
    write_study(folder / "results.jsonl", head, study_runs() if runs is None else runs)
    return folder


STEP_PARTS = ("forward_seconds", "backward_seconds", "optimizer_seconds", "exposed_seconds")


def step_row(contender: str, parts: tuple[float, ...], by: str = "waiting", **more: Any) -> dict[str, Any]:
    times = {"median_seconds": 0.01, "minimum_seconds": 0.009, "maximum_seconds": 0.012, "ratio": 1.25}
    shared = {"workload": "mlp", "setting": "", "ranks": 2, "rounds": 3, "exposed_by": by}
    return {"contender": contender, **shared, **times, **dict(zip(STEP_PARTS, parts, strict=True)), **more}


STEPS = [
    step_row("no_communication", (0.002, 0.004, 0.001, 0.0)),
    step_row("allreduce_sgd", (0.002, 0.0045, 0.001, 0.0005)),
    step_row("torch_ddp_gloo", (0.002, 0.007, 0.001, 0.003), "difference"),
]


LAYERS: list[dict[str, Any]] = [
    {"model": "cnn", "batch_size": 32, "layer": layer, "kind": kind, "shape": shape, "bytes": n_bytes, "flops": flops}
    for layer, kind, shape, n_bytes, flops in (
        ("conv", "convolution", "3×3, 3→16", 1792, 1_792_000),
        ("norm", "other", "", 128, None),
        ("fc", "fully connected", "64→10", 2600, 3900),
        ("conv2", "convolution", "3×3, 16→16", 9280, 928_000),
    )
]

SCALING: list[dict[str, Any]] = [
    {
        "kind": "validation",
        "ranks": 2,
        "computing": "modelled",
        "oversubscription": None,
        "measured_seconds": 0.01,
        "minimum_seconds": 0.009,
        "maximum_seconds": 0.012,
        "predicted_seconds": 0.011,
        "error": 0.1,
    },
    *(
        {
            "kind": "prediction",
            "model": "mlp",
            "plan": plan,
            "scaling": "strong",
            "network": "10 µs, 25 Gbit/s",
            "ranks": ranks,
            "speed_up": 0.8 * ranks,
            "scaling_efficiency": 0.8,
            **dict.fromkeys(("straggler_seconds", *STEP_PARTS), 0.001),
        }
        for plan in ("sync", "local")
        for ranks in (2, 64)
    ),
]


def course_row(figure: str, series: str, points: int = 2, **changed: Any) -> dict[str, Any]:
    """Return a line of the course's figure, with so many points and the folders of two runs."""
    return {
        "figure": figure,
        "series": series,
        "title": "Loss",
        "x": list(range(1, points + 1)),
        "y": [0.6 / place for place in range(1, points + 1)],
        "low": [0.5 / place for place in range(1, points + 1)],
        "high": [0.7] * (points - 1) + [None],
        "x_label": "samples",
        "y_label": "loss (nats)",
        "n": 2,
        "x_log": False,
        "y_log": True,
        "note": "made up",
        "runs": [f"{series}-seed{seed}" for seed in (0, 1)],
        **changed,
    }


def write_record(path: Path, benchmark: str, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({**HEAD, "benchmark": benchmark, "rows": rows}))
    return path
