"""Halving-doubling all-reduce: a reduce-scatter by recursive halving, then an all-gather by recursive doubling.

Papers: Rabenseifner, "Optimization of collective reduction operations", ICCS 2004; Thakur, Rabenseifner and Gropp,
"Optimization of collective communication operations in MPICH", IJHPCA 2005.

Steps: 2 lg P, in round k with the rank at distance 2^k, so that the longest messages go to the nearest rank; the
all-gather goes back the same way. Elements sent by a rank: 2(P-1)/P n where P divides n. For P not a power of two this
runs on a core of 2^k ranks after a fold of n elements (`fold.py`): 2 steps and n sent elements more.

The order of summation of an element does not depend on where chunk borders lie: whichever rank ends up with it, it is
summed along the same binary tree of ranks, ((0+1)+(2+3))+..., up to the order of the two summands of an addition,
which does not change its bits. So the bits are equal whatever the bucket or segment size, and equal to those of
`recursive_doubling.py` and `tree.py`.

Differences from the papers: where P is not a power of two, a folded rank hands over its whole buffer instead of
exchanging halves with its neighbour first. Chunks may differ by one element or be empty, so that any length works.
"""

from collections.abc import Iterator
from typing import TypeVar

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
from allreduce_sgd.schedules.step import Column, Integers, Step, chunk, chunks

__all__ = ["columns", "elements_sent", "halving_doubling", "step_count"]

Index = TypeVar("Index", int, Integers)


def halving_doubling(rank: int, size: int, length: int) -> Iterator[Step]:
    """All-reduce: afterwards every rank holds the reduction of all buffers."""
    yield from fold(rank, size, length)
    if not is_folded(rank, size):
        exchanges = list(_exchanges(rank, size, length))
        for peer, kept, other in exchanges:
            yield Step(peer, other, peer, kept, reduce=True)
        for peer, kept, other in reversed(exchanges):
            yield Step(peer, kept, peer, other, reduce=False)
    yield from unfold(rank, size, length)


def columns(size: int, length: int) -> Iterator[Column]:
    """The rounds of `halving_doubling`."""
    core = Core(size)
    own = _reversed_bits(core.index, core.levels)
    parts = 1 << core.levels

    def block(index: Integers, level: int) -> tuple[Integers, Integers]:
        return chunks(length, parts, index << level)[0], chunks(length, parts, ((index + 1) << level) - 1)[1]

    def exchanges(level: int) -> tuple[Integers, tuple[Integers, Integers], tuple[Integers, Integers]]:
        peers = core.ranks(core.index ^ (1 << (core.levels - 1 - level)))
        return peers, block(own >> level, level), block((own >> level) ^ 1, level)

    yield from fold_columns(size, length)
    for level in reversed(range(core.levels)):
        peers, kept, other = exchanges(level)
        yield core.exchange(peers, send=other, recv=kept, reduce=True)
    for level in range(core.levels):
        peers, kept, other = exchanges(level)
        yield core.exchange(peers, send=kept, recv=other, reduce=False)
    yield from unfold_columns(size, length)


def step_count(rank: int, size: int, length: int) -> int:
    """Return the number of steps of `rank`."""
    return 2 if is_folded(rank, size) else 2 * core_levels(size) + 2 * takes_in(rank, size)


def elements_sent(rank: int, size: int, length: int) -> int:
    """Return how many elements `rank` sends: all but its own chunk, the blocks it gathers, and n for a fold."""
    if is_folded(rank, size):
        return length
    kept = [kept.stop - kept.start for _, kept, _ in _exchanges(rank, size, length)]
    halving = length - kept[-1] if kept else 0
    return halving + sum(kept) + length * takes_in(rank, size)


def _exchanges(rank: int, size: int, length: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield peer, the block that `rank` goes on with, and the block of its peer, in the order of halving."""
    levels = core_levels(size)
    index = core_index(rank, size)
    own = _reversed_bits(index, levels)
    for level in reversed(range(levels)):
        kept, other = (_block(length, levels, block, level) for block in (own >> level, (own >> level) ^ 1))
        yield core_rank(index ^ (1 << (levels - 1 - level)), size), kept, other


def _block(length: int, levels: int, index: int, level: int) -> slice:
    """Return aligned block `index` of 2^level chunks, of 2^levels chunks in all."""
    first, last = index << level, ((index + 1) << level) - 1
    return slice(chunk(length, 1 << levels, first).start, chunk(length, 1 << levels, last).stop)


def _reversed_bits(index: Index, bits: int) -> Index:
    """Return `index` with its lowest `bits` bits in reverse order: the chunk that a core rank ends up with."""
    result = index * 0
    for bit in range(bits):
        result |= (index >> bit & 1) << (bits - 1 - bit)
    return result
