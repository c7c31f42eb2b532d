"""The Work of a library that runs operations by itself and is only asked whether they have ended."""

import time
from collections.abc import Callable

from torch import Tensor

from allreduce_sgd.comm.base import Traffic
from allreduce_sgd.errors import CommunicationError, CommunicationTimeout

__all__ = ["PolledWork"]

_SLEEP_SECONDS = 0.00002
_LONGEST_SLEEP_SECONDS = 0.0005


class PolledWork:
    """A Work that asks `ended` until it says so, and then calls `finish` once, in the thread that waits.

    `name` is what errors call the operation; `timeout_seconds` holds for waits that give none. What `finish` raises as
    RuntimeError becomes the CommunicationError of every wait.
    """

    def __init__(
        self,
        name: str,
        buffer: Tensor,
        ended: Callable[[], bool],
        finish: Callable[[], None],
        timeout_seconds: float,
        traffic: Traffic,
    ) -> None:
        self._name = name
        self._buffer = buffer
        self._ended = ended
        self._finish = finish
        self._timeout_seconds = timeout_seconds
        self._traffic = traffic
        self._account = traffic.account
        self._started_seconds = time.perf_counter()
        self._finished = False
        self._error: CommunicationError | None = None

    def wait(self, timeout: float | None = None) -> Tensor:
        if not self._finished:
            started = time.perf_counter()
            try:
                self._poll(self._timeout_seconds if timeout is None else timeout)
                self._end()
            finally:
                self._traffic.waited(self._account, time.perf_counter() - started)
        if self._error is not None:
            raise self._error
        return self._buffer

    def done(self) -> bool:
        return self._finished or self._ended()

    def _poll(self, limit_seconds: float) -> None:
        deadline_seconds = time.perf_counter() + limit_seconds
        pause_seconds = _SLEEP_SECONDS
        while not self._ended():
            if time.perf_counter() >= deadline_seconds:
                raise CommunicationTimeout(
                    f"{self._name}: not finished after {limit_seconds:g} s; a rank is stuck, gone or late"
                )
            # A wait that spins would take the core from the library's own thread.
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LONGEST_SLEEP_SECONDS)

    def _end(self) -> None:
        self._finished = True
        try:
            self._finish()
        except RuntimeError as problem:
            self._error = CommunicationError(f"{self._name} failed: {problem}")
            self._error.__cause__ = problem
        self._traffic.ended(self._account, time.perf_counter() - self._started_seconds)
