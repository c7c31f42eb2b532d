"""The progress engine: moves started operations on, since MPI moves nothing unless it is called.

Operations are generators that yield whenever they wait for a peer. One lock stands around every call of MPI. Who
advances them: the thread that starts an operation, once, if the lock is free (so its first message leaves at once); a
thread that waits for one, all the time; and a progress thread while nobody waits, which is what overlaps communication
with back-propagation. A blocking operation is advanced by its caller alone: the progress thread is not even woken.

Collectives of one communicator run first in, first out; point-to-point operations run beside them. Polling backs off:
a blocked wait that spins would take the core from the peer it waits for. Where all that is waited for is one semaphore
shared with the peers of this node, the thread sleeps on it instead, and is woken by the peer.

Now and then a channel's watch has a look (`desync.py`): from a thread that waits or, less often, from the progress
thread, so that a rank that computes still answers what others ask.
"""

import ctypes
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from torch import Tensor

from allreduce_sgd.comm.base import Traffic
from allreduce_sgd.errors import CommunicationError, CommunicationTimeout, MismatchError

__all__ = ["Channel", "Operation", "Program", "ProgressEngine", "Sleeper", "Watch"]


class Sleeper(Protocol):
    """What a program waits for, if a thread can sleep on it."""

    def sleep(self, seconds: float) -> None:
        """Return when what is waited for has come, or after so many seconds."""


class Watch(Protocol):
    """Finds out why the collectives of one communicator stand still; see `desync.py`. `elsewhere` is set here."""

    elsewhere: Callable[[], str | None]

    def look(self, waits_in: int | None, moved: bool, now_seconds: float) -> CommunicationError | None:
        """Return the error that ends the collectives; they stand in number `waits_in`. The lock is held."""

    def failed(self, why: str) -> None:
        """Tell the other ranks. The lock is held."""

    def explain(self, number: int) -> str:
        """Say why the collective of this number has not ended. The lock is held."""


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
_LOOK_SECONDS = 0.1
_IDLE_LOOK_SECONDS = 0.25
_EXPLAIN_SECONDS = 0.5
_NAMED = 4
_CLOSE_SECONDS = 5.0


class Operation:
    """A started operation; also the Work that its caller holds. `name` is asked for where something went wrong.

    `started_seconds` and `ended_seconds` are readings of time.perf_counter: when its turn came, and when it had ended.
    A collective has a `number`, and a watch that says why it did not end in time.
    """

    def __init__(
        self,
        engine: "ProgressEngine",
        program: Program,
        buffer: Tensor,
        name: Callable[[], str],
        timeout: float,
        traffic: Traffic,
        number: int = 0,
        watch: Watch | None = None,
    ) -> None:
        self.name = name
        self.number = number
        self.buffer = buffer
        self.finished = False
        self.error: CommunicationError | None = None
        self.sleeper: Sleeper | None = None
        self._engine = engine
        self._program = program
        self._timeout = timeout
        self._traffic = traffic
        self._account = traffic.account
        self._watch = watch
        self.started_seconds: float | None = None
        self.ended_seconds: float | None = None

    def advance(self) -> bool:
        """Go on as far as possible without waiting, and say whether anything moved. The engine's lock is held."""
        if self.started_seconds is None:
            self.started_seconds = time.perf_counter()
        self._traffic.running = self._account
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
            if isinstance(problem, MismatchError):
                self.error = MismatchError(f"{self.name()}: {problem}")
            else:
                self.error = CommunicationError(f"{self.name()} failed: {problem!r}")
            self.error.__cause__ = problem
            if not isinstance(problem, Exception):
                self.finished = True
                raise
        self.ended_seconds = time.perf_counter()
        self._traffic.ended(self._account, self.ended_seconds - self.started_seconds)
        self.finished = True
        return True

    def fail(self, cause: CommunicationError) -> None:
        """End without having been started, or in the midst of it."""
        kind = MismatchError if isinstance(cause, MismatchError) else CommunicationError
        if self.started_seconds is None:
            self.error = kind(f"{self.name()}: not started, since an earlier operation failed ({cause})")
        else:
            self.error = kind(f"{self.name()}: {cause}")
            # MPI may still write to its memory.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        self.finished = True

    def wait(self, timeout: float | None = None) -> Tensor:
        limit = self._timeout if timeout is None else timeout
        started = time.perf_counter()
        if not self.finished and not self._engine.drive(self, started + limit):
            raise CommunicationTimeout(f"{self.name()}: not finished after {limit:g} s; {self._explain()}")
        self._traffic.waited(self._account, time.perf_counter() - started)
        if self.error is not None:
            raise self.error
        return self.buffer

    def done(self) -> bool:
        return self.finished

    def _explain(self) -> str:
        if self._watch is None:
            return "a rank is stuck, gone or late"
        if not self._engine.lock.acquire(timeout=_EXPLAIN_SECONDS):
            return "another thread of this rank is stuck inside MPI"
        try:
            return self._watch.explain(self.number)
        finally:
            self._engine.lock.release()


class Channel:
    """The collectives of one communicator, first in, first out.

    After one has failed the ranks no longer agree about what comes next, so that the rest fails too.
    """

    def __init__(self, poke: Callable[[], object] | None, watch: Watch | None = None) -> None:
        self.queue: deque[Operation] = deque()
        self.poke = poke
        self.watch = watch
        self._moved = False
        self._failure: CommunicationError | None = None

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
                self.fail(head.error)
        if moved:
            self._moved = True
        return moved

    def look(self, now_seconds: float) -> None:
        """Let the watch find out whether what is under way can still end."""
        if self.watch is not None:
            waits_in = self.queue[0].number if self.queue else None
            problem = self.watch.look(waits_in, self._moved, now_seconds)
            self._moved = False
            if problem is not None:
                self.fail(problem)

    def fail(self, cause: CommunicationError) -> None:
        """End all that is under way and all that comes later, and tell the other ranks."""
        self._failure = cause
        while self.queue:
            self.queue.popleft().fail(cause)
        if self.watch is not None:
            self.watch.failed(str(cause))


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
        self._look_at_seconds = 0.0
        self._thread: threading.Thread | None = None

    def open_channel(self, poke: Callable[[], object] | None = None, watch: Watch | None = None) -> Channel:
        """Return a new first-in, first-out queue, for the collectives of one communicator.

        `poke` is called now and then, with the lock held, also while nothing is under way: over a network MPI may call
        a message sent of which a part still waits in this process, and without a call of MPI it waits there for ever.
        """
        channel = Channel(poke, watch)
        if watch is not None:
            watch.elsewhere = partial(self._elsewhere, channel)
        with self.lock:
            self._channels.append(channel)
        with self._state:
            self._users += 1
            if self._thread is None:
                # The interpreter's 5 ms turn would keep messages waiting longer than a whole training step takes.
                sys.setswitchinterval(min(sys.getswitchinterval(), _GIL_SWITCH_SECONDS))
                self._thread = threading.Thread(target=self._run, name="allreduce-progress", daemon=True)
                self._thread.start()
            else:
                # It may have gone to sleep for good while it had nothing to look after.
                self._state.notify_all()
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
                now_seconds = time.perf_counter()
                left = deadline_seconds - now_seconds
                if left <= 0 or not self.lock.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
                    return False
                try:
                    moved = self._advance()
                    if now_seconds >= self._look_at_seconds:
                        self._look(now_seconds)
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
                    self._state.wait(self._idle_seconds())
                    if self._drivers == 0 and (self._poked() or time.perf_counter() >= self._look_at_seconds):
                        break
                if self._thread is not current:
                    return
            with self.lock:
                self._poke()
                self._look_if_due()
            # Beside a thread that computes on the same core, spinning would take half of it.
            backoff = Backoff(0.0)
            while self._thread is current and self._drivers == 0 and self._busy():
                with self.lock:
                    moved = self._advance()
                    self._look_if_due()
                    sleeper = self._sleeper()
                backoff.pause(moved, sleeper)

    def _idle_seconds(self) -> float | None:
        """Return how long the progress thread may sleep while there is nothing for it to move on."""
        if self._poked():
            return _POKE_SECONDS
        if not self.spare_cores:
            return _NEGLECTED_SECONDS
        return _IDLE_LOOK_SECONDS if any(channel.watch is not None for channel in self._channels) else None

    def _look_if_due(self) -> None:
        now_seconds = time.perf_counter()
        if now_seconds >= self._look_at_seconds:
            self._look(now_seconds)

    def _look(self, now_seconds: float) -> None:
        self._look_at_seconds = now_seconds + _LOOK_SECONDS
        for channel in self._channels:
            channel.look(now_seconds)

    def _elsewhere(self, channel: Channel) -> str | None:
        """Name what is under way beside the channel's collectives."""
        heads = [other.queue[0] for other in self._channels if other is not channel and other.queue]
        return "; ".join(operation.name() for operation in (*heads, *self._messages)[:_NAMED]) or None

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
