"""At which step all ranks stop, when one of them is asked to.

Ranks that step together must stop at the same step, also those of methods that let them drift apart (local steps,
gossip). They agree without a collective where they share memory: every rank, before it begins a step, notes how far the
furthest of them has begun, and whoever is asked to stop makes that the last step. Nobody goes past it, and all come to
it. A step costs some microseconds, and no bytes.

Elsewhere (several nodes, other back ends) ranks reduce two numbers now and then, start it at one step and look at the
outcome some steps later, so that nobody waits. How many that are they settle with it: as many as the slowest rank takes
in a quarter of a second, at least one. So they stop within about half a second, or after two steps where these take
longer. Bytes per rank: an all-reduce of 16 bytes, four times a second.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch

from allreduce_sgd.comm.base import Communicator, ReduceOp, Work
from allreduce_sgd.comm.shared_numbers import SharedNumbers
from allreduce_sgd.errors import MemoryNotSharedError

__all__ = ["StopPoint", "stop_point"]

_SPACING_SECONDS = 0.25
_BEGUN, _LAST = 0, 1


class StopPoint(Protocol):
    def reached(self, step: int) -> bool:
        """Say whether training ends after so many steps; the same on all ranks. To be called before every step."""


def stop_point(comm: Communicator, asked: Callable[[], bool], first: int) -> StopPoint:
    """Return where the ranks of `comm` stop once `asked` says yes on any; after `first` they take one step at least.

    All ranks must call, with the same `first`.
    """
    try:
        return _InSharedMemory(SharedNumbers(comm, 2), asked, first)
    except MemoryNotSharedError:
        return _ByMessages(comm, asked)


class _InSharedMemory:
    def __init__(self, numbers: SharedNumbers, asked: Callable[[], bool], first: int) -> None:
        self._numbers = numbers
        self._asked = asked
        self._earliest = first + 1

    def reached(self, step: int) -> bool:
        asked = self._asked()
        with self._numbers as numbers:
            if asked and not numbers[_LAST]:
                numbers[_LAST] = max(numbers[_BEGUN], self._earliest)
            if numbers[_LAST] and step >= numbers[_LAST]:
                return True
            numbers[_BEGUN] = max(numbers[_BEGUN], step + 1)
            return False


class _ByMessages:
    def __init__(self, comm: Communicator, asked: Callable[[], bool]) -> None:
        self._comm = comm
        self._asked = asked
        self._work: Work | None = None
        self._started_step = 0
        self._started_seconds = time.perf_counter()
        self._spacing = 1

    def reached(self, step: int) -> bool:
        own_steps = 1.0
        now = time.perf_counter()
        if self._work is not None:
            if step < self._started_step + self._spacing:
                return False
            with self._comm.traffic.attributed("stopping"):
                any_asked, fewest = self._work.wait().tolist()
            if any_asked:
                return True
            seconds = max(now - self._started_seconds, 1e-9)
            own_steps = (step - self._started_step) * _SPACING_SECONDS / seconds
            self._spacing = max(1, int(-fewest))
        report = torch.tensor([float(self._asked()), -own_steps], dtype=torch.float64)
        with self._comm.traffic.attributed("stopping"):
            self._work = self._comm.all_reduce(report, ReduceOp.MAX)
        self._started_step, self._started_seconds = step, now
        return False
