"""Runs of studies, made by hand, for tests of what is computed from them."""

import math

from benchmarks.study.results import Cell, Evaluation, Phase, Run

__all__ = ["cell", "run"]


def cell(contender: str, batch: int, label: str | None = None, ranks: int = 1) -> Cell:
    return Cell(label or f"{contender} {batch}", contender, "sync", ranks, 1, batch)


def run(
    cell: Cell,
    seconds: float,
    samples: float,
    seed: int = 0,
    lr: float = 0.1,
    phase: Phase = "measured",
    accuracy: float = 0.9,
) -> Run:
    """A run that reached its target after so many seconds, or missed it; a missed target still has a speed."""
    missed = math.isinf(seconds)
    return Run(
        cell=cell,
        phase=phase,
        lr=lr,
        seed=seed,
        reached=not missed,
        seconds=seconds,
        wall_seconds=seconds + 1,
        samples=samples,
        steps=samples / cell.global_batch_size,
        bytes=math.inf if missed else 8.0,
        samples_per_second=100.0 if missed else samples / seconds,
        communication_seconds=0.0,
        exposed_communication_seconds=0.0,
        train_seconds=99.0 if missed else seconds,
        noise_scale=None,
        folder=f"runs/{cell.label}-{lr}-{seed}",
        evaluations=(Evaluation(1, 1, 1.0, 1.0, 8.0, accuracy, None),),
    )
