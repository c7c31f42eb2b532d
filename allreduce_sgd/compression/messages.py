"""Every rank sends every other one a row of its own: an all-to-all out of messages between two ranks.

P-1 messages out and P-1 in, all posted at once, each of one row. They travel beside the communicator's collectives.
"""

import time
from collections.abc import Sequence

from torch import Tensor

from allreduce_sgd.comm.base import Communicator, Work

__all__ = ["Together", "exchange_rows", "has_messages"]

# Rows of exchanges that overlap cannot be mixed up, since messages of one tag arrive in the order they were sent in.
# MPI guarantees tags up to 32767; users of the same communicator take small numbers.
_TAG = 31249

# NCCL would need all messages of a rank in one group, and Horovod has none.
_WITH_MESSAGES = ("mpi", "gloo")


def has_messages(comm: Communicator) -> bool:
    """Say whether `exchange_rows` works over this communicator."""
    return comm.backend in _WITH_MESSAGES


def exchange_rows(outgoing: Tensor, incoming: Tensor, comm: Communicator) -> Work:
    """Send row r of `outgoing` to rank r, and receive rank r's row into row r of `incoming`. All ranks must call.

    Both are contiguous, of shape (comm.size, row); the own rows stay as they are. Returns one Work for all messages,
    whose buffer is `incoming`.
    """
    works: list[Work] = []
    for distance in range(1, comm.size):
        source, to = (comm.rank - distance) % comm.size, (comm.rank + distance) % comm.size
        works.append(comm.receive(incoming[source], source, _TAG))
        works.append(comm.send(outgoing[to], to, _TAG))
    return Together(works, incoming, comm.timeout_seconds)


class Together:
    """Several Works as one, with one deadline; `buffer` is what `wait` returns."""

    def __init__(self, works: Sequence[Work], buffer: Tensor, timeout_seconds: float) -> None:
        self._works = works
        self._buffer = buffer
        self._timeout_seconds = timeout_seconds

    def wait(self, timeout: float | None = None) -> Tensor:
        deadline_seconds = time.monotonic() + (self._timeout_seconds if timeout is None else timeout)
        for work in self._works:
            work.wait(max(0.0, deadline_seconds - time.monotonic()))
        return self._buffer

    def done(self) -> bool:
        return all(work.done() for work in self._works)
