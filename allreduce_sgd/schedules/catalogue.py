"""The all-reduce algorithms by name, each with its schedule, its columnar form and its closed forms.

An algorithm that is not segmented takes a segment size everywhere too and ignores it, so that callers treat all alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from allreduce_sgd.schedules import (
    chain,
    cost,
    halving_doubling,
    recursive_doubling,
    ring,
    segmented_ring,
    tree,
)
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.step import Columnar, Schedule

__all__ = ["ALL_REDUCE", "Algorithm", "cheapest"]


@dataclass(frozen=True)
class Algorithm:
    """One all-reduce algorithm. Segments are elements to the schedules and bytes to the cost; None does not cut."""

    name: str
    segmented: bool
    """Whether a segment size makes a difference; the others ignore it."""
    order_free_of_chunks: bool
    """Whether the order in which an element is summed is the same wherever it lies in a buffer, whatever its length."""
    schedule: Callable[[int | None], Schedule]
    """segment -> the schedule."""
    columns: Callable[[int | None], Columnar]
    """segment -> the columnar form of the schedule."""
    step_count: Callable[[int, int, int, int | None], int]
    """(rank, size, length, segment) -> the number of steps of that rank."""
    elements_sent: Callable[[int, int, int], int]
    """(rank, size, length) -> how many elements that rank sends, with any segment."""
    seconds: Callable[[int, float, LinkCost, int | None], float]
    """(size, n_bytes, link, segment_bytes) -> the closed-form cost."""
    best_segment_bytes: Callable[[int, float, LinkCost], int | None]
    """(size, n_bytes, link) -> the segment size of least cost, a multiple of 64 bytes; None: do not cut."""


def cheapest(size: int, n_bytes: float, link: LinkCost, candidates: Sequence[str]) -> str:
    """Return the candidate of least closed-form cost, each with its best segment size.

    Of equals the first in `candidates`, so ranks that agree about the arguments agree about the choice. Raises
    ValueError without candidates and KeyError for a name that ALL_REDUCE has not.
    """

    def seconds(name: str) -> float:
        algorithm = ALL_REDUCE[name]
        return algorithm.seconds(size, n_bytes, link, algorithm.best_segment_bytes(size, n_bytes, link))

    return min(candidates, key=seconds)


def _uncut(
    name: str,
    order_free_of_chunks: bool,
    schedule: Schedule,
    columns: Columnar,
    step_count: Callable[[int, int, int], int],
    elements_sent: Callable[[int, int, int], int],
    seconds: Callable[[int, float, LinkCost], float],
) -> Algorithm:
    return Algorithm(
        name,
        segmented=False,
        order_free_of_chunks=order_free_of_chunks,
        schedule=lambda segment: schedule,
        columns=lambda segment: columns,
        step_count=lambda rank, size, length, segment: step_count(rank, size, length),
        elements_sent=elements_sent,
        seconds=lambda size, n_bytes, link, segment_bytes: seconds(size, n_bytes, link),
        best_segment_bytes=lambda size, n_bytes, link: None,
    )


ALL_REDUCE: Mapping[str, Algorithm] = MappingProxyType(
    {
        algorithm.name: algorithm
        for algorithm in (
            _uncut("ring", False, ring.ring, ring.columns, ring.step_count, ring.elements_sent, cost.ring),
            Algorithm(
                "segmented-ring",
                segmented=True,
                order_free_of_chunks=False,
                schedule=segmented_ring.segmented_ring,
                columns=segmented_ring.columns,
                step_count=segmented_ring.step_count,
                elements_sent=segmented_ring.elements_sent,
                seconds=cost.segmented_ring,
                best_segment_bytes=cost.segmented_ring_segment_bytes,
            ),
            _uncut(
                "recursive-doubling",
                True,
                recursive_doubling.recursive_doubling,
                recursive_doubling.columns,
                recursive_doubling.step_count,
                recursive_doubling.elements_sent,
                cost.recursive_doubling,
            ),
            _uncut(
                "halving-doubling",
                True,
                halving_doubling.halving_doubling,
                halving_doubling.columns,
                halving_doubling.step_count,
                halving_doubling.elements_sent,
                cost.halving_doubling,
            ),
            _uncut("tree", True, tree.tree, tree.columns, tree.step_count, tree.elements_sent, cost.tree),
            Algorithm(
                "chain",
                segmented=True,
                order_free_of_chunks=True,
                schedule=chain.chain,
                columns=chain.columns,
                step_count=chain.step_count,
                elements_sent=chain.elements_sent,
                seconds=cost.chain,
                best_segment_bytes=cost.chain_segment_bytes,
            ),
        )
    }
)
"""The algorithms by name."""
