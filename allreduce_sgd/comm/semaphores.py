"""Barriers between the processes of one node, on POSIX semaphores in memory that they share.

Why semaphores rather than flags: POSIX has `sem_post` and `sem_wait` synchronise memory (POSIX.1-2017, volume 1,
section 4.12), so what a rank wrote before it came to a barrier is seen by all ranks after it also on weakly ordered
processors (ARM, POWER), where plain stores from Python could overtake one another. And a waiter can sleep in the kernel
until it is posted: it yields its core, and wakes within microseconds.

The barrier is the dissemination barrier (Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization",
International Journal of Parallel Programming 1988): in round k rank r posts to r + 2^k and waits for r - 2^k;
ceil(log2 q) rounds. Every semaphore has one poster and one waiter, and counts, so a rank that is ahead by one barrier
does no harm.
"""

import ctypes
import errno
import os
import time
from collections.abc import Iterator

from torch import Tensor

__all__ = ["SEMAPHORE_BYTES", "NodeBarrier", "Semaphore", "barrier_bytes", "create_semaphores"]

# A cache line each, so that two waiters do not disturb each other; sem_t itself has 32 bytes in glibc and 16 in musl.
SEMAPHORE_BYTES = 64


# Some 20 µs: what peers that come at the same time are apart.
_LOOKS = 64


class _TimeSpec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]  # as ctypes wants it


class Semaphore:
    """A semaphore in shared memory, at byte `offset`; several objects, in several processes, may stand for one.

    It keeps the memory: a thread may still sleep on it when the communicator is closed.
    """

    def __init__(self, memory: Tensor, offset: int) -> None:
        self._memory = memory
        # Calls that never wait keep the interpreter's lock: giving it up would cost more than they take.
        quick, slow = ctypes.PyDLL(None), ctypes.CDLL(None, use_errno=True)
        self._address = ctypes.c_void_p(memory.data_ptr() + offset)
        self._post = quick.sem_post
        self._try_wait = quick.sem_trywait
        self._timed_wait = slow.sem_timedwait

    def post(self) -> None:
        self._post(self._address)

    def take(self) -> bool:
        """Take one post if there is one, without waiting."""
        return self._try_wait(self._address) == 0

    def sleep(self, seconds: float) -> None:
        """Sleep until there is a post, at most this long; it is left for `take`."""
        nanoseconds = time.time_ns() + int(seconds * 1e9)
        until = _TimeSpec(nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
        if self._timed_wait(self._address, ctypes.byref(until)) == 0:
            # Given back, for `take` and for other threads that sleep on it.
            self._post(self._address)
        elif ctypes.get_errno() not in (errno.ETIMEDOUT, errno.EINTR):
            raise OSError(ctypes.get_errno(), f"sem_timedwait: {os.strerror(ctypes.get_errno())}")


def barrier_bytes(ranks: int) -> int:
    """Return how much shared memory the barrier of so many ranks takes."""
    return ranks * max(1, _rounds(ranks)) * SEMAPHORE_BYTES


def create_semaphores(memory: Tensor, ranks: int) -> None:
    """Initialise the semaphores at the start of shared memory. One rank calls, before any other uses them."""
    init = ctypes.CDLL(None, use_errno=True).sem_init
    for offset in range(0, barrier_bytes(ranks), SEMAPHORE_BYTES):
        if init(ctypes.c_void_p(memory.data_ptr() + offset), 1, 0) != 0:
            raise OSError(ctypes.get_errno(), f"sem_init: {os.strerror(ctypes.get_errno())}")


class NodeBarrier:
    """A barrier of `ranks` processes whose semaphores are the first thing in `memory`, a flat tensor of bytes.

    `spin`: look again for a moment before yielding; not where there are more ranks than cores.
    """

    def __init__(self, memory: Tensor, rank: int, ranks: int, spin: bool) -> None:
        self._looks = _LOOKS if spin else 1
        rounds = _rounds(ranks)

        def semaphore(owner: int, index: int) -> Semaphore:
            return Semaphore(memory, (owner * rounds + index) * SEMAPHORE_BYTES)

        self._rounds = [
            (semaphore((rank + (1 << index)) % ranks, index), semaphore(rank, index)) for index in range(rounds)
        ]

    def pass_through(self) -> Iterator[Semaphore]:
        """Come to the barrier; yields the semaphore waited for as long as not all ranks have come.

        What any rank wrote before, all ranks see afterwards.
        """
        for peer, own in self._rounds:
            peer.post()
            looks = self._looks
            while not own.take():
                looks -= 1
                if looks <= 0:
                    yield own


def _rounds(ranks: int) -> int:
    return (ranks - 1).bit_length()
