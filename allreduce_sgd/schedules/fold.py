"""Folding: with P not a power of two, some ranks hand their buffer to a neighbour, and 2^k ranks, the core, go on.

Paper: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.

Of the first 2(P - 2^k) ranks the odd ones are folded: each sends its buffer of n elements to the even rank before it,
and gets the result back at the end. Two steps and n elements sent, by a folded rank and by the one that takes it in;
none by the others. The ranks of the core are numbered 0..2^k - 1 in the order of ranks, so every aligned block of
core indices is a block of neighbouring ranks.
"""

from collections.abc import Iterator

import numpy as np

from allreduce_sgd.schedules.columns import column
from allreduce_sgd.schedules.step import NOTHING, Booleans, Column, Integers, Step

__all__ = [
    "Core",
    "core_index",
    "core_levels",
    "core_rank",
    "fold",
    "fold_columns",
    "is_folded",
    "takes_in",
    "unfold",
    "unfold_columns",
]

Bounds = tuple[Integers | int, Integers | int]


def core_levels(size: int) -> int:
    """Return k, the largest with 2^k <= size: the core has 2^k ranks."""
    return size.bit_length() - 1


def is_folded(rank: int, size: int) -> bool:
    """Say whether `rank` is outside the core."""
    return rank % 2 == 1 and rank < 2 * _extra(size)


def takes_in(rank: int, size: int) -> bool:
    """Say whether `rank` takes in the buffer of the rank after it."""
    return rank % 2 == 0 and rank < 2 * _extra(size)


def core_index(rank: int, size: int) -> int:
    """Return the index of `rank` in the core; for a folded rank, of the rank that takes it in."""
    return rank - min((rank + 1) // 2, _extra(size))


def core_rank(index: int, size: int) -> int:
    """Return the rank that has this index in the core."""
    return index + min(index, _extra(size))


def fold(rank: int, size: int, length: int) -> Iterator[Step]:
    """Afterwards the ranks of the core hold the reduction of all buffers between them. At most one step."""
    whole = slice(0, length)
    if is_folded(rank, size):
        yield Step(rank - 1, whole, None, NOTHING, reduce=False)
    elif takes_in(rank, size):
        yield Step(None, NOTHING, rank + 1, whole, reduce=True)


def unfold(rank: int, size: int, length: int) -> Iterator[Step]:
    """Afterwards each folded rank holds the buffer of the rank that took it in. At most one step."""
    whole = slice(0, length)
    if is_folded(rank, size):
        yield Step(None, NOTHING, rank - 1, whole, reduce=False)
    elif takes_in(rank, size):
        yield Step(rank + 1, whole, None, NOTHING, reduce=False)


def fold_columns(size: int, length: int) -> Iterator[Column]:
    """The round of `fold`; none where P is a power of two."""
    if _extra(size):
        _, folded, taking = _parts(size)
        yield _neighbours(size, folded, -1, taking, length, reduce=True)


def unfold_columns(size: int, length: int) -> Iterator[Column]:
    """The round of `unfold`; none where P is a power of two."""
    if _extra(size):
        _, folded, taking = _parts(size)
        yield _neighbours(size, taking, 1, folded, length, reduce=False)


class Core:
    """The core of `size` ranks as arrays of shape (size,): the `index` of each rank, and which are `members`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.levels = core_levels(size)
        ranks, folded, _ = _parts(size)
        self.members = ~folded
        self.index: Integers = ranks - np.minimum((ranks + 1) // 2, _extra(size))

    def ranks(self, index: Integers) -> Integers:
        """Return the ranks that have these indices in the core."""
        return index + np.minimum(index, _extra(self.size))

    def exchange(self, peers: Integers, *, send: Bounds, recv: Bounds, reduce: bool) -> Column:
        """Return the round in which each member sends `send` (starts, stops) to its peer and receives `recv`."""
        return column(
            self.size,
            sends=self.members,
            send_to=peers,
            send=send,
            receives=self.members,
            recv_from=peers,
            recv=recv,
            reduce=reduce,
        )


def _extra(size: int) -> int:
    return size - (1 << core_levels(size))


def _neighbours(size: int, sends: Booleans, to: int, receives: Booleans, length: int, reduce: bool) -> Column:
    ranks, whole = np.arange(size), (0, length)
    return column(
        size,
        sends=sends,
        send_to=ranks + to,
        send=whole,
        receives=receives,
        recv_from=ranks - to,
        recv=whole,
        reduce=reduce,
    )


def _parts(size: int) -> tuple[Integers, Booleans, Booleans]:
    ranks = np.arange(size)
    inside = ranks < 2 * _extra(size)
    return ranks, inside & (ranks % 2 == 1), inside & (ranks % 2 == 0)
