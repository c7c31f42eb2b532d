"""Ring all-reduce: a reduce-scatter and an all-gather, each around the ring of ranks.

Paper: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.

Steps: 2(P-1), each to the right neighbour and from the left one. Elements sent by rank r of P, buffer length n cut
into P chunks c_0..c_{P-1}: 2n - |c_r| - |c_{r+1}|, which is 2(P-1)/P n where P divides n, the least any all-reduce can
send. The chunk of index c is summed in the order of ranks c+1, c+2, ..., c, so equal P and length give equal bits; but
the order of an element's sum depends on the chunk it falls into, so another bucket size gives other bits.

Differences from the paper: chunks may differ by one element or be empty, so that any length works.
"""

from collections.abc import Iterator

import numpy as np

from allreduce_sgd.schedules.columns import column
from allreduce_sgd.schedules.step import Column, Step, chunk, chunks

__all__ = [
    "all_gather",
    "all_gather_columns",
    "columns",
    "elements_sent",
    "reduce_scatter",
    "reduce_scatter_columns",
    "ring",
    "step_count",
]


def ring(rank: int, size: int, length: int) -> Iterator[Step]:
    """All-reduce: afterwards every rank holds the reduction of all buffers."""
    yield from reduce_scatter(rank, size, length)
    yield from all_gather(rank, size, length)


def reduce_scatter(rank: int, size: int, length: int) -> Iterator[Step]:
    """Afterwards chunk `rank` of rank's buffer is the reduction; the other chunks hold partial sums. P-1 steps."""
    for s in range(size - 1):
        yield _step(rank, size, length, rank - s - 1, reduce=True)


def all_gather(rank: int, size: int, length: int) -> Iterator[Step]:
    """Before, chunk `rank` of each rank's buffer is its contribution; afterwards all hold all chunks. P-1 steps."""
    for s in range(size - 1):
        yield _step(rank, size, length, rank - s, reduce=False)


def columns(size: int, length: int) -> Iterator[Column]:
    """The rounds of `ring`: 2(P-1), all ranks busy in each."""
    yield from reduce_scatter_columns(size, length)
    yield from all_gather_columns(size, length)


def reduce_scatter_columns(size: int, length: int) -> Iterator[Column]:
    """The rounds of `reduce_scatter`."""
    return _columns(size, length, first=size - 1, reduce=True)


def all_gather_columns(size: int, length: int) -> Iterator[Column]:
    """The rounds of `all_gather`."""
    return _columns(size, length, first=size, reduce=False)


def step_count(rank: int, size: int, length: int) -> int:
    """Return the number of steps of `ring`: the same on every rank and for every length."""
    return 2 * (size - 1)


def elements_sent(rank: int, size: int, length: int) -> int:
    """Return how many elements `rank` sends in `ring`."""
    if size == 1:
        return 0
    kept = [chunk(length, size, index) for index in (rank, rank + 1)]
    return 2 * length - sum(piece.stop - piece.start for piece in kept)


def _step(rank: int, size: int, length: int, sent: int, reduce: bool) -> Step:
    right, left = (rank + 1) % size, (rank - 1) % size
    return Step(right, chunk(length, size, sent), left, chunk(length, size, sent - 1), reduce)


def _columns(size: int, length: int, first: int, reduce: bool) -> Iterator[Column]:
    """Yield P-1 rounds, in round s of which rank r sends chunk r + first - s (modulo P)."""
    ranks = np.arange(size)
    right, left = (ranks + 1) % size, (ranks - 1) % size
    # Chunk bounds twice over, so that each round is a window of them: nothing is computed per round.
    starts, stops = (np.tile(bounds, 2) for bounds in chunks(length, size, ranks))
    for s in range(size - 1):
        sent, received = (slice(offset, offset + size) for offset in (first - s, first - s - 1))
        yield column(
            size,
            sends=True,
            send_to=right,
            send=(starts[sent], stops[sent]),
            receives=True,
            recv_from=left,
            recv=(starts[received], stops[received]),
            reduce=reduce,
        )
