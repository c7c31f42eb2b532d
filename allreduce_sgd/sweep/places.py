"""Sharing the machine out: every trial that runs at the same time has its own ranks, cores and GPUs.

A trial's processes may use the cores of its place only (their affinity), so that those of several trials do not meet on
one core; among them no rank is bound. GPUs are told to a trial by CUDA_VISIBLE_DEVICES.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from allreduce_sgd.errors import ConfigError, counted

__all__ = ["Place", "places"]

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where one trial at a time runs; `gpus` as in CUDA_VISIBLE_DEVICES, None where the machine has none to share."""

    cores: tuple[int, ...]
    threads_per_rank: int
    gpus: tuple[str, ...] | None = None


def places(ranks: int | None, ranks_per_trial: int, environment: Mapping[str, str]) -> list[Place]:
    """Return the places for `ranks` ranks, None for as many as there are cores. Raises ConfigError."""
    cores = sorted(os.sched_getaffinity(0))
    if ranks is None:
        ranks = max(ranks_per_trial, len(cores) // ranks_per_trial * ranks_per_trial)
    if ranks % ranks_per_trial:
        raise ConfigError(
            f"--ranks {ranks}: not a multiple of --ranks-per-trial {ranks_per_trial}, so that "
            f"{counted(ranks % ranks_per_trial, 'rank')} would have nothing to do"
        )
    number = ranks // ranks_per_trial
    gpus = _gpus(environment)
    found = []
    for index in range(number):
        own = _part(cores, index, number)
        found.append(
            Place(tuple(own), max(1, len(own) // ranks_per_trial), tuple(_part(gpus, index, number)) if gpus else None)
        )
    return found


def _part(things: Sequence[T], index: int, number: int) -> Sequence[T]:
    """Return part `index` of `number` equal ones; where there are too few things, several parts have the same one."""
    if len(things) < number:
        return [things[index % len(things)]]
    return things[index * len(things) // number : (index + 1) * len(things) // number]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each.strip() for each in visible.split(",") if each.strip()]
    devices = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return [str(each) for each in sorted(int(name) for name in devices if name.isdecimal())]
