"""A few numbers that all ranks of a node read and change, one rank at a time.

Mutual exclusion by a semaphore that starts at one (Dijkstra, "Cooperating sequential processes", 1965). What a rank
wrote while it held the lock, the next one sees (`semaphores.py` says why); a rank that waits sleeps in the kernel. Lock
and numbers lie in the node's shared memory, so nothing stays behind when ranks die; where one dies holding the lock,
the others' wait ends at the deadline.
"""

import time

import torch

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.semaphores import SEMAPHORE_BYTES, Semaphore, create_semaphores
from allreduce_sgd.errors import CommunicationTimeout, MemoryNotSharedError

__all__ = ["SharedNumbers"]

_NUMBER_BYTES = 8
# Shorter than any deadline that matters: the kernel counts by a clock that may be set.
_SLEEP_SECONDS = 1.0
_LOOKS = 64


class SharedNumbers:
    """`count` numbers in double precision, at first 0, so whole numbers are exact up to 2^53.

    `with shared as numbers:` holds the lock, and gives the numbers as a writable memoryview of doubles, to be used
    within only. It may not be nested. Entering raises CommunicationTimeout at the communicator's deadline.

    All ranks must make it together. Raises MemoryNotSharedError on all of them where they do not share memory.
    """

    def __init__(self, comm: Communicator, count: int) -> None:
        self._timeout_seconds = comm.timeout_seconds
        self._traffic = comm.traffic
        n_bytes = SEMAPHORE_BYTES + count * _NUMBER_BYTES
        if comm.size == 1:
            memory = torch.zeros(n_bytes, dtype=torch.uint8)
        else:
            given = comm.allocate_shared(n_bytes, torch.uint8, torch.device("cpu"))
            if given is None:
                raise MemoryNotSharedError(f"the ranks have no memory in common, or --backend {comm.backend} has none")
            memory = given
        self._lock = Semaphore(memory, 0)
        if comm.rank == 0:
            create_semaphores(memory, 1)
            self._lock.post()
        numbers = memory[SEMAPHORE_BYTES:].numpy()
        self._numbers = memoryview(numbers).cast("d")  # type: ignore[arg-type]  # arrays are buffers
        comm.barrier().wait()

    def __enter__(self) -> "memoryview[float]":
        # Held for a few microseconds, and ranks that step together come together.
        if not any(self._lock.take() for _ in range(_LOOKS)):
            self._wait()
        return self._numbers

    def __exit__(self, *_: object) -> None:
        self._lock.post()

    def _wait(self) -> None:
        started = time.perf_counter()
        try:
            while not self._lock.take():
                left_seconds = started + self._timeout_seconds - time.perf_counter()
                if left_seconds <= 0:
                    raise CommunicationTimeout(
                        f"the lock of numbers that ranks share: not free after {self._timeout_seconds:g} s; the rank "
                        f"that holds it is stuck or gone"
                    )
                self._lock.sleep(min(left_seconds, _SLEEP_SECONDS))
        finally:
            self._traffic.waited(self._traffic.account, time.perf_counter() - started)
