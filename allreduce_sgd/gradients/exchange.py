"""How one bucket of gradients gets reduced over the ranks: the exchanges that a reducer can be given.

An exchange is started when a bucket is full, and is a generator: it yields works that it has started, is advanced when
they have ended, and when it ends the bucket's buffer holds what it makes of it. `rounds` counts the collectives that
follow one another: an exchange of one round needs nothing of the other ranks after its first work, so it may be
advanced at any time; the others must be at points that are the same on all ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, Protocol

from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import Codec, CodecFactory
from allreduce_sgd.gradients.buckets import Bucket

__all__ = ["AllReduce", "Compressed", "Exchange", "Flight", "Rounds", "Waitable"]


class Waitable(Protocol):
    """One of our works, or a future of torch."""

    def wait(self) -> Any: ...
    def done(self) -> bool: ...


Rounds = Generator[Waitable, None, None]


class Flight:
    """An exchange under way; `work` is what it waits for, None when it has ended."""

    __slots__ = ("_rounds", "work")

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self.work: Waitable | None = next(rounds, None)

    def advance(self) -> None:
        """Wait for the present work, and start the next."""
        if self.work is not None:
            self.work.wait()
            self.work = next(self._rounds, None)

    def land(self) -> None:
        """Take the exchange to its end."""
        while self.work is not None:
            self.advance()


class Exchange(ABC):
    """What the reducer asks of an exchange.

    `rides_along`: what is appended to a bucket is summed exactly with it. `whole`: afterwards each rank has the whole
    bucket, not only its chunk. `stateful`: buckets must keep their parameters. `spacing`: gradients begin at multiples
    of so many elements.
    """

    rides_along = False
    whole = True
    stateful = False
    rounds = 1
    spacing = 1

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def factor(self, weight: float) -> float:
        """Return what gradients are to be multiplied by, for a sum that weighs this rank's by `weight`."""
        return weight

    def length(self, numel: int) -> int:
        """Return the length that the buffer of a bucket of so many elements needs."""
        return numel

    def prepare(self, buckets: Sequence[Bucket]) -> None:  # noqa: B027 - most have nothing to prepare
        """Be told the buckets, before the first exchange and whenever they change."""

    @abstractmethod
    def start(self, index: int, bucket: Bucket, message: Tensor) -> Rounds:
        """Exchange a bucket; `message` is its buffer with what rides along. All ranks must, in the same order."""


class AllReduce(Exchange):
    """The sum over ranks, in place: one all-reduce, no copy."""

    rides_along = True

    def start(self, index: int, bucket: Bucket, message: Tensor) -> Rounds:
        yield self.comm.all_reduce(message)


class Compressed(Exchange):
    """What a codec makes of the sum. Copies: the codec's own, and one of its outcome into the bucket."""

    stateful = True

    def __init__(self, comm: Communicator, make: CodecFactory) -> None:
        super().__init__(comm)
        self._make = make
        self.codecs: list[Codec] = []

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        self.codecs = [self._make(bucket.slots) for bucket in buckets]
        self.rounds = max((codec.rounds for codec in self.codecs), default=1)

    def start(self, index: int, bucket: Bucket, message: Tensor) -> Rounds:
        reduced, _ = yield from self.codecs[index].reduce(bucket.buffer, self.comm)
        if reduced.data_ptr() != bucket.buffer.data_ptr():
            bucket.buffer.copy_(reduced)
