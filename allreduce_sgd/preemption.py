"""Being told to stop: what schedulers send before a time limit, and when a job is to make room for another.

SIGUSR1           stop after a checkpoint
SIGTERM           the same, within `grace_seconds`; past them this rank ends the job with status 1, and says so
a second SIGTERM  ends the job at once, and so does a second SIGINT, for a rank that does not get to the first

One rank that is told is enough. Ranks that share memory see one another's flags, so that also one that only serves
parameters may be told; on several nodes, or over a back end without shared memory, it must be one that trains.

A thread reads signals from a pipe that the interpreter's own handler writes (`signal.set_wakeup_fd`): Python's handlers
wait for the main thread to come out of whatever it computes, and a grace period does not. Launchers that pass a signal
on, and got it together with their ranks, have these get it twice: what comes within a second is one.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from allreduce_sgd.errors import MemoryNotSharedError, write_line
from allreduce_sgd.topology import Topology

if TYPE_CHECKING:
    from allreduce_sgd.comm.base import Communicator

__all__ = ["Preemption"]

_SAME_SECONDS = 1.0
# No signal has this number.
_THE_END = 0
# So that rank 0 has ended the job before another rank would say the same.
_PEER_DELAY_SECONDS = 1.0
# Launchers drop what a rank wrote last if it aborts before they have read it.
_FORWARDING_SECONDS = 0.3


class Preemption:
    """Takes SIGUSR1 and SIGTERM while its `with` block lasts; outside the main thread it takes none."""

    def __init__(self, topology: Topology, grace_seconds: float) -> None:
        self._topology = topology
        self._grace_seconds = grace_seconds
        self._lock = threading.Lock()
        self._flags: bytearray | memoryview = bytearray(1)
        self._own = 0
        self._came_seconds: dict[int, float] = {}
        self._deadline: threading.Timer | None = None
        self._settled = False
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1
        self._pipe: tuple[int, int] | None = None
        self._reader = threading.Thread(target=self._read, name="signals", daemon=True)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._reader.start()
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            for number in (signal.SIGUSR1, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, _leave_to_the_reader)
            forget = weakref.WeakMethod(self._forget)
            os.register_at_fork(after_in_child=lambda: _call(forget))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        if self._pipe is None:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        # Not by closing it: a process that user code has forked may have it too.
        os.write(self._pipe[1], bytes([_THE_END]))
        self._reader.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = None

    def asked(self) -> bool:
        """Say whether this rank, or one that it shares memory with, was told to stop."""
        return any(self._flags)

    def share(self, comm: "Communicator") -> None:
        """See what ranks of `comm` are told, and let them see what this one is, where they share memory.

        All ranks must call.
        """
        import torch

        try:
            memory = comm.allocate_shared(comm.size, torch.uint8, torch.device("cpu"))
        except MemoryNotSharedError:
            return
        if memory is None:
            return
        flags = memoryview(memory.numpy())  # type: ignore[arg-type]  # arrays are buffers
        with self._lock:
            flags[comm.rank] = self._flags[self._own]
            self._flags, self._own = flags, comm.rank

    def _forget(self) -> None:
        """In a process that user code has forked: what it is told is not meant for this rank, and signals end it."""
        if self._pipe is None:
            return
        with contextlib.suppress(ValueError):  # forked by another thread than the main one
            signal.set_wakeup_fd(-1)
            for number in self._handlers:
                signal.signal(number, signal.SIG_DFL)
        self._pipe = None

    def settle(self) -> None:
        """Be told that what was asked for is done: there is no deadline any more."""
        with self._lock:
            self._settled = True
            if self._deadline is not None:
                self._deadline.cancel()

    def _read(self) -> None:
        assert self._pipe is not None
        while True:
            for number in os.read(self._pipe[0], 64):
                if number == _THE_END:
                    return
                self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        first = self._came_seconds.setdefault(number, now)
        if number in (signal.SIGTERM, signal.SIGINT) and now - first > _SAME_SECONDS:
            self._end(f"{signal.Signals(number).name} a second time: ended at once", 128 + number)
        if number not in (signal.SIGUSR1, signal.SIGTERM):
            return
        with self._lock:
            self._flags[self._own] = 1
            if number == signal.SIGTERM and self._deadline is None and not self._settled:
                delay_seconds = _PEER_DELAY_SECONDS if self._topology.rank > 0 else 0.0
                self._deadline = threading.Timer(self._grace_seconds + delay_seconds, self._give_up)
                self._deadline.daemon = True
                self._deadline.start()

    def _give_up(self) -> None:
        with self._lock:
            if self._settled:
                return
            self._end(
                f"SIGTERM: not at an end with a checkpoint within --grace-seconds {self._grace_seconds:g}; those that "
                f"were written are whole",
                1,
            )

    def _end(self, why: str, status: int) -> None:
        try:
            write_line(f"{self._topology.describe()}: {why}", sys.__stderr__ or sys.stderr)
            time.sleep(_FORWARDING_SECONDS)
        finally:
            self._topology.abort(status)


def _call(method: "weakref.WeakMethod[Callable[[], None]]") -> None:
    found = method()
    if found is not None:
        found()


def _leave_to_the_reader(number: int, frame: FrameType | None) -> None:
    """Replace the signal's default action, which would end the process."""
