"""The progress engine: moves started operations on, since MPI moves nothing unless it is called.

Operations are generators that yield whenever they wait for a peer. One lock stands around every call of MPI. Who
advances them: the thread that starts an operation, once, if the lock is free (so its first message leaves at once); a
thread that waits for one, all the time; and a progress thread while nobody waits, which is what overlaps communication
with back-propagation. A blocking operation is advanced by its caller alone: the progress thread is not even woken.

Collectives of one communicator run first in, first out; point-to-point operations run beside them. Polling backs off:
a blocked wait that spins would take the core from the peer it waits for. Where all that is waited for is one semaphore
shared with the peers of this node, the thread sleeps on it instead, and is woken by the peer.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from allreduce_sgd.comm.base import Traffic
from allreduce_sgd.errors import CommunicationError, CommunicationTimeout

__all__ = ["Channel", "Operation", "Program", "ProgressEngine", "Sleeper"]


class Sleeper(Protocol):
    """What a program waits for, if a thread can sleep on it."""

    def sleep(self, seconds: float) -> None:
        """Return when what is waited for has come, or after so many seconds."""


Program = Iterator[bool | Sleeper]
"""Yields where it waits for a peer: True if it got on since the last time, False if not, or what it waits for."""

_GIL_SWITCH_SECONDS = 0.0005
_SPIN_SECONDS = 0.0002
_SLEEP_SECONDS = 0.00005
# Over TCP a transfer keeps the full rate as long as MPI is called every 0.2 ms, and half of it every 1 ms.
_LONGEST_SLEEP_SECONDS = 0.0002
# Longer, since a peer's post ends it; not for ever, since other operations may be started meanwhile.
_SLEEPER_SECONDS = 0.002
_POKE_SECONDS = 0.005
_NEGLECTED_SECONDS = 0.02
_CLOSE_SECONDS = 5.0


class Operation:
    """A started operation; also the Work that its caller holds. `name` is asked for where something went wrong.

    `started_seconds` and `ended_seconds` are readings of time.perf_counter: when its turn came, and when it had ended.
    """

    def __init__(
        self,
        engine: "ProgressEngine",
        program: Program,
        buffer: Tensor,
        name: Callable[[], str],
        timeout: float,
        traffic: Traffic,
    ) -> None:
        self.name = name
        self.buffer = buffer
        self.finished = False
        self.error: Exception | None = None
        self.sleeper: Sleeper | None = None
        self._engine = engine
        self._program = program
        self._timeout = timeout
        self._traffic = traffic
        self.started_seconds: float | None = None
        self.ended_seconds: float | None = None

    def advance(self) -> bool:
        """Go on as far as possible without waiting, and say whether anything moved. The engine's lock is held."""
        if self.started_seconds is None:
            self.started_seconds = time.perf_counter()
        try:
            state = next(self._program)
            if isinstance(state, bool):
                self.sleeper = None
                return state
            moved = state is not self.sleeper
            self.sleeper = state
            return moved
        except StopIteration:
            pass
        except BaseException as problem:
            self.error = CommunicationError(f"{self.name()} failed: {problem!r}")
            self.error.__cause__ = problem
            if not isinstance(problem, Exception):
                self.finished = True
                raise
        self.ended_seconds = time.perf_counter()
        self._traffic.busy_seconds += self.ended_seconds - self.started_seconds
        self.finished = True
        return True

    def fail(self, why: str) -> None:
        """End without having been started."""
        self.error = CommunicationError(f"{self.name()}: not started, since an earlier operation failed ({why})")
        self.finished = True

    def wait(self, timeout: float | None = None) -> Tensor:
        limit = self._timeout if timeout is None else timeout
        started = time.perf_counter()
        if not self.finished and not self._engine.drive(self, started + limit):
            raise CommunicationTimeout(f"{self.name()}: not finished after {limit:g} s; a rank is stuck, gone or late")
        self._traffic.waited_seconds += time.perf_counter() - started
        if self.error is not None:
            raise self.error
        return self.buffer

    def done(self) -> bool:
        return self.finished


class Channel:
    """The collectives of one communicator, first in, first out.

    After one has failed the ranks no longer agree about what comes next, so that the rest fails too.
    """

    def __init__(self, poke: Callable[[], object] | None) -> None:
        self.queue: deque[Operation] = deque()
        self.poke = poke
        self._failure: str | None = None

    def append(self, operation: Operation) -> None:
        if self._failure is None:
            self.queue.append(operation)
        else:
            operation.fail(self._failure)

    def advance(self) -> bool:
        moved = False
        while self.queue:
            head = self.queue[0]
            moved |= head.advance()
            if not head.finished:
                break
            self.queue.popleft()
            if head.error is not None:
                self._failure = str(head.error)
                while self.queue:
                    self.queue.popleft().fail(self._failure)
        return moved


class Backoff:
    """Spins for a moment after something moved last, then sleeps, longer each time up to a bound."""

    def __init__(self, spin_seconds: float) -> None:
        self._spin_seconds = spin_seconds
        self._moved_seconds = time.perf_counter()
        self._sleep_seconds = _SLEEP_SECONDS

    def pause(self, moved: bool, sleeper: Sleeper | None) -> None:
        now = time.perf_counter()
        if moved:
            self._moved_seconds = now
            self._sleep_seconds = _SLEEP_SECONDS
        if now - self._moved_seconds < self._spin_seconds:
            # Unlike time.sleep(0), which arms a timer and comes back some 60 µs later.
            os.sched_yield()
        elif sleeper is not None:
            sleeper.sleep(_SLEEPER_SECONDS)
        else:
            time.sleep(self._sleep_seconds)
            self._sleep_seconds = min(2 * self._sleep_seconds, _LONGEST_SLEEP_SECONDS)


class ProgressEngine:
    """Advances the operations of all communicators of this process that share `lock`.

    `oversubscribed`: the node has more ranks than cores, so that nobody spins. `spare_cores`: it has fewer, so that a
    progress thread has a core to run on. Without one it would only take turns with the thread that computes, which
    then does better to move things on itself, whenever it starts or awaits an operation; the progress thread looks
    after what lies around for long. (Between nodes transfers need the thread in any case.)
    """

    def __init__(self, lock: threading.Lock, oversubscribed: bool = False, spare_cores: bool = True) -> None:
        self.lock = lock
        self.oversubscribed = oversubscribed
        self.spare_cores = spare_cores
        self._spin_seconds = 0.0 if oversubscribed else _SPIN_SECONDS
        # Appending to a deque is atomic, so starting an operation never waits for the lock.
        self._inbox: deque[tuple[Operation, Channel | None]] = deque()
        self._channels: list[Channel] = []
        self._messages: list[Operation] = []
        self._state = threading.Condition()
        self._drivers = 0
        self._users = 0
        self._thread: threading.Thread | None = None

    def open_channel(self, poke: Callable[[], object] | None = None) -> Channel:
        """Return a new first-in, first-out queue, for the collectives of one communicator.

        `poke` is called now and then, with the lock held, also while nothing is under way: over a network MPI may call
        a message sent of which a part still waits in this process, and without a call of MPI it waits there for ever.
        """
        channel = Channel(poke)
        with self.lock:
            self._channels.append(channel)
        with self._state:
            self._users += 1
            if self._thread is None:
                # The interpreter's 5 ms turn would keep messages waiting longer than a whole training step takes.
                sys.setswitchinterval(min(sys.getswitchinterval(), _GIL_SWITCH_SECONDS))
                self._thread = threading.Thread(target=self._run, name="allreduce-progress", daemon=True)
                self._thread.start()
        return channel

    def close_channel(self, channel: Channel) -> None:
        """Forget a channel; with the last one the progress thread ends."""
        with self.lock:
            self._channels = [other for other in self._channels if other is not channel]
        with self._state:
            self._users -= 1
            thread = self._thread if self._users == 0 else None
            if thread is not None:
                self._thread = None
            self._state.notify_all()
        if thread is not None:
            thread.join(_CLOSE_SECONDS)

    def submit(self, operation: Operation, channel: Channel | None, blocking: bool = False) -> None:
        """Queue an operation, in a channel or (None) beside them, and start it at once if nobody holds the lock.

        A caller that asks for `blocking` drives the operation next, so the progress thread is left asleep.
        """
        self._inbox.append((operation, channel))
        if self.lock.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self.lock.release()
        if not operation.finished and not blocking:
            self._wake()

    def drive(self, operation: Operation, deadline_seconds: float) -> bool:
        """Advance everything until `operation` has ended or the clock passes the deadline; say whether it ended."""
        backoff = Backoff(self._spin_seconds)
        with self._state:
            self._drivers += 1
        try:
            while not operation.finished:
                left = deadline_seconds - time.perf_counter()
                if left <= 0 or not self.lock.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
                    return False
                try:
                    moved = self._advance()
                    sleeper = self._sleeper()
                finally:
                    self.lock.release()
                if not operation.finished:
                    backoff.pause(moved, sleeper)
        finally:
            with self._state:
                self._drivers -= 1
            if self._busy():
                self._wake()
        return True

    def _wake(self) -> None:
        if self.spare_cores or self._poked():
            with self._state:
                self._state.notify()

    def _run(self) -> None:
        current = threading.current_thread()
        while True:
            with self._state:
                while self._thread is current and (self._drivers > 0 or not self._busy()):
                    poked = self._poked()
                    self._state.wait(_POKE_SECONDS if poked else None if self.spare_cores else _NEGLECTED_SECONDS)
                    if poked and self._drivers == 0:
                        break
                if self._thread is not current:
                    return
            with self.lock:
                self._poke()
            # Beside a thread that computes on the same core, spinning would take half of it.
            backoff = Backoff(0.0)
            while self._thread is current and self._drivers == 0 and self._busy():
                with self.lock:
                    moved = self._advance()
                    sleeper = self._sleeper()
                backoff.pause(moved, sleeper)

    def _poked(self) -> bool:
        return any(channel.poke is not None for channel in self._channels)

    def _poke(self) -> None:
        for channel in self._channels:
            if channel.poke is not None:
                channel.poke()

    def _busy(self) -> bool:
        return bool(self._inbox or self._messages or any(channel.queue for channel in self._channels))

    def _sleeper(self) -> Sleeper | None:
        """Return what the only operation under way waits for; None where there are several, or it must be polled."""
        heads = [channel.queue[0] for channel in self._channels if channel.queue]
        alone = len(heads) == 1 and not self._messages and not self._inbox and not self._poked()
        return heads[0].sleeper if alone else None

    def _advance(self) -> bool:
        """Give every operation that may run a turn; say whether anything moved. The lock is held."""
        moved = False
        self._poke()
        while self._inbox:
            operation, channel = self._inbox.popleft()
            if channel is None:
                self._messages.append(operation)
            else:
                channel.append(operation)
        for channel in self._channels:
            moved |= channel.advance()
        if self._messages:
            for message in self._messages:
                moved |= message.advance()
            self._messages = [message for message in self._messages if not message.finished]
        return moved
