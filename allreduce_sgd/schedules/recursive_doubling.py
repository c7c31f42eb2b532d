"""Recursive doubling all-reduce: in round k, ranks at distance 2^k exchange and add their whole buffers.

Paper: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.

Steps: lg P, each with one peer; for P not a power of two, floor(lg P) on the core and two more for a fold (`fold.py`).
Elements sent by a rank: n a step. The fewest steps of all, so the fastest for short buffers.

Every element is summed along the same binary tree of ranks, ((0+1)+(2+3))+... after the fold's pairs of neighbours, up
to the order of the two summands of an addition, which does not change its bits. So all ranks have equal bits, and they
do not depend on how the buffer was cut before; `halving_doubling.py` and `tree.py` sum along the same tree and give the
same bits.

Differences from the paper: none.
"""

from collections.abc import Iterator

from allreduce_sgd.schedules.fold import (
    Core,
    core_index,
    core_levels,
    core_rank,
    fold,
    fold_columns,
    is_folded,
    takes_in,
    unfold,
    unfold_columns,
)
from allreduce_sgd.schedules.step import Column, Step

__all__ = ["columns", "elements_sent", "recursive_doubling", "step_count"]


def recursive_doubling(rank: int, size: int, length: int) -> Iterator[Step]:
    """All-reduce: afterwards every rank holds the reduction of all buffers."""
    whole = slice(0, length)
    yield from fold(rank, size, length)
    if not is_folded(rank, size):
        for level in range(core_levels(size)):
            peer = core_rank(core_index(rank, size) ^ (1 << level), size)
            yield Step(peer, whole, peer, whole, reduce=True)
    yield from unfold(rank, size, length)


def columns(size: int, length: int) -> Iterator[Column]:
    """The rounds of `recursive_doubling`."""
    core = Core(size)
    yield from fold_columns(size, length)
    for level in range(core.levels):
        peers = core.ranks(core.index ^ (1 << level))
        yield core.exchange(peers, send=(0, length), recv=(0, length), reduce=True)
    yield from unfold_columns(size, length)


def step_count(rank: int, size: int, length: int) -> int:
    """Return the number of steps of `rank`."""
    return 2 if is_folded(rank, size) else core_levels(size) + 2 * takes_in(rank, size)


def elements_sent(rank: int, size: int, length: int) -> int:
    """Return how many elements `rank` sends."""
    return length * (1 if is_folded(rank, size) else core_levels(size) + takes_in(rank, size))
