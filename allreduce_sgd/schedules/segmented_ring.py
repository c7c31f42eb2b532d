"""Segmented ring all-reduce: each step of the ring is cut into segments, so that sending hides reducing.

Paper: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009, for the
ring; segments as in Pješivac-Grbović et al., "Performance analysis of MPI collective operations", Cluster Computing
2007.

With K = ceil(ceil(n/P) / segment) segments to a chunk: 2(P-1)K steps, in the order ring step (outermost), segment.
Segment k of ring step s+1 needs only segment k of step s, K steps before it, so an executor that looks ahead by up to
K-1 steps sends one segment while it reduces the one before. Elements sent are those of the ring: 2(P-1)/P n.
All ranks have the same K: where a chunk is shorter than the longest one, its last segment may be empty.

Differences from the papers: a segment's length is chosen, not the number of segments. As for the ring, an element's
sum depends on the chunk it falls into (not on the segment).
"""

from collections.abc import Iterator

import numpy as np

from allreduce_sgd.schedules import ring
from allreduce_sgd.schedules.ring import elements_sent
from allreduce_sgd.schedules.step import Column, Columnar, Schedule, Step, segment_count, segment_of

__all__ = ["columns", "elements_sent", "segmented_ring", "step_count"]


def segmented_ring(segment: int | None) -> Schedule:
    """Return the ring all-reduce whose steps move at most `segment` elements; None does not cut: the plain ring."""

    def schedule(rank: int, size: int, length: int) -> Iterator[Step]:
        segments = _segments(size, length, segment)
        for step in ring.ring(rank, size, length):
            for k in range(segments):
                yield step._replace(send=segment_of(step.send, segment, k), recv=segment_of(step.recv, segment, k))

    return schedule


def columns(segment: int | None) -> Columnar:
    """Return the columnar form of `segmented_ring(segment)`."""

    def rounds(size: int, length: int) -> Iterator[Column]:
        segments = _segments(size, length, segment)
        for whole in ring.columns(size, length):
            if segment is None or segments == 1:
                yield whole
                continue
            for k in range(segments):
                yield whole._replace(
                    send_start=np.minimum(whole.send_start + k * segment, whole.send_stop),
                    send_stop=np.minimum(whole.send_start + (k + 1) * segment, whole.send_stop),
                    recv_start=np.minimum(whole.recv_start + k * segment, whole.recv_stop),
                    recv_stop=np.minimum(whole.recv_start + (k + 1) * segment, whole.recv_stop),
                )

    return rounds


def step_count(rank: int, size: int, length: int, segment: int | None) -> int:
    """Return the number of steps of `segmented_ring(segment)`: the same on every rank."""
    return ring.step_count(rank, size, length) * _segments(size, length, segment)


def _segments(size: int, length: int, segment: int | None) -> int:
    longest = -(-length // size)
    return segment_count(longest, segment)
