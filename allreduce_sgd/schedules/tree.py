"""Binomial trees: broadcast from rank 0, reduce to rank 0, and the all-reduce that is a reduce and a broadcast.

Paper: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.

Broadcast: in round k every rank that has the buffer passes it to the rank 2^k further on. Reduce: in round k half of
the ranks that still take part send their sums to ranks at distance 2^k and are done. Each has ceil(log2 P) rounds of n
elements, and all ranks together send (P-1)n; rank 0 takes part in every round. So the all-reduce has 2 ceil(log2 P)
rounds; it suits short buffers, and rank 0 alone needs the sum where only the reduce is used.

Every element is summed along the same tree of ranks wherever the buffer was cut before, so that its bits do not depend
on bucket or segment size; `recursive_doubling.py` and `halving_doubling.py` sum along the same tree.

Differences from the paper: for P not a power of two the reduce starts with the fold of `fold.py`, which has the same
number of rounds as a plain binomial tree and makes its order of summation that of the butterflies.
"""

from collections.abc import Iterator

import numpy as np

from allreduce_sgd.schedules.columns import column
from allreduce_sgd.schedules.fold import (
    Core,
    core_index,
    core_levels,
    core_rank,
    fold,
    fold_columns,
    is_folded,
    takes_in,
)
from allreduce_sgd.schedules.step import NOTHING, Column, Step

__all__ = [
    "broadcast",
    "broadcast_columns",
    "children",
    "columns",
    "elements_sent",
    "reduce",
    "reduce_columns",
    "reduce_step_count",
    "step_count",
    "tree",
]


def tree(rank: int, size: int, length: int) -> Iterator[Step]:
    """All-reduce: afterwards every rank holds the reduction of all buffers."""
    yield from reduce(rank, size, length)
    yield from broadcast(rank, size, length)


def reduce(rank: int, size: int, length: int) -> Iterator[Step]:
    """Afterwards rank 0 holds the reduction of all buffers; the other ranks' buffers hold partial sums."""
    whole = slice(0, length)
    yield from fold(rank, size, length)
    if is_folded(rank, size):
        return
    index = core_index(rank, size)
    for level in range(core_levels(size)):
        peer = core_rank(index ^ (1 << level), size)
        if index >> level & 1:
            yield Step(peer, whole, None, NOTHING, reduce=False)
            return
        yield Step(None, NOTHING, peer, whole, reduce=True)


def broadcast(rank: int, size: int, length: int) -> Iterator[Step]:
    """Afterwards every rank holds the buffer of rank 0."""
    whole = slice(0, length)
    if rank > 0:
        parent = rank - (1 << (rank.bit_length() - 1))
        yield Step(None, NOTHING, parent, whole, reduce=False)
    for child in children(rank, size):
        yield Step(child, whole, None, NOTHING, reduce=False)


def children(rank: int, size: int) -> list[int]:
    """Return the ranks to which `rank` passes the buffer in `broadcast`, in order."""
    distances = (1 << k for k in range(rank.bit_length(), (size - 1).bit_length()))
    return [rank + distance for distance in distances if rank + distance < size]


def columns(size: int, length: int) -> Iterator[Column]:
    """The rounds of `tree`."""
    yield from reduce_columns(size, length)
    yield from broadcast_columns(size, length)


def reduce_columns(size: int, length: int) -> Iterator[Column]:
    """The rounds of `reduce`."""
    core = Core(size)
    yield from fold_columns(size, length)
    for level in range(core.levels):
        active = core.members & (core.index % (1 << level) == 0)
        upper = (core.index >> level & 1).astype(np.bool_)
        peers = core.ranks(core.index ^ (1 << level))
        yield column(
            size,
            sends=active & upper,
            send_to=peers,
            send=(0, length),
            receives=active & ~upper,
            recv_from=peers,
            recv=(0, length),
            reduce=True,
        )


def broadcast_columns(size: int, length: int) -> Iterator[Column]:
    """The rounds of `broadcast`."""
    ranks = np.arange(size)
    for level in range((size - 1).bit_length()):
        distance = 1 << level
        yield column(
            size,
            sends=(ranks < distance) & (ranks + distance < size),
            send_to=ranks + distance,
            send=(0, length),
            receives=(ranks >= distance) & (ranks < 2 * distance),
            recv_from=ranks - distance,
            recv=(0, length),
            reduce=False,
        )


def step_count(rank: int, size: int, length: int) -> int:
    """Return the number of steps of `rank` in `tree`: one for each message that it sends or receives."""
    return reduce_step_count(rank, size) + len(children(rank, size)) + (rank > 0)


def reduce_step_count(rank: int, size: int) -> int:
    """Return the number of steps of `rank` in `reduce`: those it receives, and unless it is rank 0 the one it sends."""
    if is_folded(rank, size):
        return 1
    index = core_index(rank, size)
    lowest_bit = (index & -index).bit_length()
    return takes_in(rank, size) + (lowest_bit if index else core_levels(size))


def elements_sent(rank: int, size: int, length: int) -> int:
    """Return how many elements `rank` sends in `tree`: once up, and to each of its children down."""
    return length * ((rank > 0) + len(children(rank, size)))
