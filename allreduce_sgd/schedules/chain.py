"""Pipelined chain all-reduce: segments are reduced along the chain of ranks to rank 0, then broadcast back along it.

Paper: Pješivac-Grbović et al., "Performance analysis of MPI collective operations", Cluster Computing 2007.

With m = max(1, ceil(n / segment)) segments, each of the two passes takes P + m - 2 rounds: the first segment needs P-1
of them to reach the other end, and the m-1 others follow it. In a round a rank receives segment k and sends segment
k-1, so 2(P + m - 2) rounds of alpha + (n/m)·beta, P + m - 2 of them reducing n/m. Steps of a rank: 2m at both ends of
the chain, 2(m+1) between. Elements sent: 2n, at the ends n. For long buffers it comes near 2n·beta, as the ring does,
with neighbours only; its rounds grow with P + m instead of P·K.

Every element is summed along the chain, 0 + (1 + (2 + ...)), wherever segments or buckets are cut, so that its bits
do not depend on them.

Differences from the paper: the broadcast begins when rank 0 has reduced the last segment, as in the closed form
(p+m-2)(2·alpha + (n/m)(2·beta + gamma)). Segments have a chosen length, the last one may be shorter.
"""

from collections.abc import Iterator

import numpy as np

from allreduce_sgd.schedules.columns import column
from allreduce_sgd.schedules.step import NOTHING, Column, Columnar, Schedule, Step, segment_count, segment_of

__all__ = ["chain", "columns", "elements_sent", "step_count"]


def chain(segment: int | None) -> Schedule:
    """Return the all-reduce along a chain in segments of `segment` elements; None does not cut."""

    def schedule(rank: int, size: int, length: int) -> Iterator[Step]:
        segments = segment_count(length, segment)
        pieces = [segment_of(slice(0, length), segment, k) for k in range(segments)]
        yield from _travel(pieces, before=rank + 1, after=rank - 1, size=size, reduce=True)
        yield from _travel(pieces, before=rank - 1, after=rank + 1, size=size, reduce=False)

    return schedule


def columns(segment: int | None) -> Columnar:
    """Return the columnar form of `chain(segment)`."""

    def rounds(size: int, length: int) -> Iterator[Column]:
        yield from _travel_columns(size, length, segment, reduce=True)
        yield from _travel_columns(size, length, segment, reduce=False)

    return rounds


def step_count(rank: int, size: int, length: int, segment: int | None) -> int:
    """Return the number of steps of `rank` in `chain(segment)`."""
    if size == 1:
        return 0
    return 2 * (segment_count(length, segment) + (0 < rank < size - 1))


def elements_sent(rank: int, size: int, length: int) -> int:
    """Return how many elements `rank` sends in `chain(segment)`, with any segment."""
    return length * ((rank > 0) + (rank < size - 1))


def _travel(pieces: list[slice], before: int, after: int, size: int, reduce: bool) -> Iterator[Step]:
    """Pass the pieces along the chain, from `before` (outside 0..size-1 at the chain's start) on to `after`."""
    recv_from, send_to = (peer if 0 <= peer < size else None for peer in (before, after))
    for k in range(len(pieces) + 1):
        receives = recv_from is not None and k < len(pieces)
        sends = send_to is not None and k > 0
        if receives or sends:
            yield Step(
                send_to if sends else None,
                pieces[k - 1] if sends else NOTHING,
                recv_from if receives else None,
                pieces[k] if receives else NOTHING,
                reduce and receives,
            )


def _travel_columns(size: int, length: int, segment: int | None, reduce: bool) -> Iterator[Column]:
    """Yield the rounds of `_travel`, down to rank 0 and reducing, or up from it: position p sends k in round p + k."""
    if size == 1:
        return
    segments = segment_count(length, segment)
    longest = length if segment is None else segment
    ranks = np.arange(size)
    to = -1 if reduce else 1
    before, after = ranks - to, ranks + to
    # From a table of segments, last to first and with room at both ends, each round is a window: little is computed.
    table = segments - 1 + size - np.arange(segments + 2 * size)
    starts, stops = (np.clip(bound * longest, 0, length) for bound in (table, table + 1))
    exists = (table >= 0) & (table < segments)
    first, last = (ranks == end for end in ((size - 1, 0) if reduce else (0, size - 1)))
    for number in range(size + segments - 2):
        offset = segments - 1 + size - number
        sent, received = (slice(at, at + size) for at in (offset, offset - 1))
        yield column(
            size,
            sends=exists[sent][::to] & ~last,
            send_to=after,
            send=(starts[sent][::to], stops[sent][::to]),
            receives=exists[received][::to] & ~first,
            recv_from=before,
            recv=(starts[received][::to], stops[received][::to]),
            reduce=reduce,
        )
