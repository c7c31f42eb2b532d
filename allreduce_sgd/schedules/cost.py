"""Closed-form costs of an all-reduce of n bytes over p ranks, and the best segment sizes.

Paper: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005: a
message of m bytes takes alpha + beta·m, reducing m bytes takes gamma·m, and a rank sends and receives at once.

The forms are the critical path of the schedules, counted by `check.execute`, wherever the number of chunks divides the
buffer. For p not a power of two, with 2^k < p: recursive and halving-doubling run on 2^k ranks and have a fold of
2·alpha + 2n·beta + n·gamma in addition; the tree's ceil(lg p) rounds hold for any p.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "LinkCost",
    "chain",
    "chain_segment_bytes",
    "halving_doubling",
    "recursive_doubling",
    "ring",
    "segmented_ring",
    "segmented_ring_segment_bytes",
    "tree",
    "two_level",
]

# Segments are whole cache lines, which hold whole elements of every dtype.
LINE_BYTES = 64


@dataclass(frozen=True)
class LinkCost:
    """What a message and a reduction cost between two ranks. Raises ValueError for what is negative or not finite."""

    alpha_seconds: float
    """Latency of a message."""
    beta_seconds_per_byte: float
    """Time to send a byte, the inverse of the bandwidth that one rank has."""
    gamma_seconds_per_byte: float
    """Time to reduce a byte of what came into a byte of the buffer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"LinkCost: {name} is {value}, allowed are 0 and more, and finite")

    def message_seconds(self, n_bytes: float) -> float:
        """Return the time of one message."""
        return self.alpha_seconds + self.beta_seconds_per_byte * n_bytes

    def shared_by(self, ranks: int) -> "LinkCost":
        """Return the link as each of `ranks` sees it that send through one network card at once: 1/ranks of it."""
        return LinkCost(self.alpha_seconds, ranks * self.beta_seconds_per_byte, self.gamma_seconds_per_byte)


def ring(size: int, n_bytes: float, link: LinkCost) -> float:
    """2(p-1)·alpha + 2(p-1)/p·n·beta + (p-1)/p·n·gamma, in seconds."""
    piece = n_bytes / size
    return (size - 1) * (2 * link.message_seconds(piece) + link.gamma_seconds_per_byte * piece)


def segmented_ring(size: int, n_bytes: float, link: LinkCost, segment_bytes: int | None) -> float:
    """The ring with K segments to a chunk, in seconds, for an executor that sends segments while it reduces others.

    With a = alpha + s·beta for a message and b = s·gamma for a reduction of a segment of s = n/(pK) bytes, T = (p-1)K:
    max(2T·a, T·b + (T-K+2)·a) for K > 1; the plain ring for K = 1. The first is 2(p-1)K·alpha + 2(p-1)/p·n·beta.
    """
    segments = _segment_count(n_bytes / size, segment_bytes)
    if size == 1 or segments == 1:
        return ring(size, n_bytes, link)
    return _looking_ahead(size, n_bytes, link, segments)


def segmented_ring_segment_bytes(size: int, n_bytes: float, link: LinkCost) -> int | None:
    """Return the segment size with which `segmented_ring` costs least, a multiple of 64; None: do not cut."""
    if size == 1:
        return None
    chunk_bytes = n_bytes / size
    most = max(2, int(chunk_bytes // LINE_BYTES))
    segments = _least(lambda count: _looking_ahead(size, n_bytes, link, count), 2, most)
    segment_bytes = _segment_bytes(chunk_bytes, segments)
    return segment_bytes if segmented_ring(size, n_bytes, link, segment_bytes) < ring(size, n_bytes, link) else None


def recursive_doubling(size: int, n_bytes: float, link: LinkCost) -> float:
    """lg p·(alpha + n·beta + n·gamma), and a fold, in seconds."""
    step = link.message_seconds(n_bytes) + link.gamma_seconds_per_byte * n_bytes
    return _core_levels(size) * step + _fold(size, n_bytes, link)


def halving_doubling(size: int, n_bytes: float, link: LinkCost) -> float:
    """2·lg p·alpha + 2(p-1)/p·n·beta + (p-1)/p·n·gamma, and a fold, in seconds."""
    levels = _core_levels(size)
    moved = (1 - 2.0**-levels) * n_bytes
    per_byte = 2 * link.beta_seconds_per_byte + link.gamma_seconds_per_byte
    return 2 * levels * link.alpha_seconds + moved * per_byte + _fold(size, n_bytes, link)


def tree(size: int, n_bytes: float, link: LinkCost) -> float:
    """2·ceil(lg p)·(alpha + n·beta) + ceil(lg p)·n·gamma, in seconds."""
    levels = (size - 1).bit_length()
    return levels * (2 * link.message_seconds(n_bytes) + link.gamma_seconds_per_byte * n_bytes)


def chain(size: int, n_bytes: float, link: LinkCost, segment_bytes: int | None) -> float:
    """(p+m-2)·(2·alpha + (n/m)·(2·beta + gamma)) with m segments, in seconds; 0 for p = 1."""
    return _chain(size, n_bytes, link, _segment_count(n_bytes, segment_bytes))


def chain_segment_bytes(size: int, n_bytes: float, link: LinkCost) -> int | None:
    """Return the segment size with which `chain` costs least, a multiple of 64; None: do not cut.

    The number of segments is the integer beside sqrt((p-2)·n·(2·beta + gamma) / (2·alpha)).
    """
    most = max(1, int(n_bytes // LINE_BYTES))
    segments = _least(lambda count: _chain(size, n_bytes, link, count), 1, most)
    return None if segments == 1 else _segment_bytes(n_bytes, segments)


def two_level(
    local_size: int,
    nodes: int,
    n_bytes: float,
    inside: LinkCost,
    between: LinkCost,
    across: Callable[[int, float, LinkCost], float] = ring,
) -> float:
    """Seconds of a reduce-scatter and all-gather inside each of `nodes`, and between them an all-reduce of 1/q each.

    With q ranks a node and N nodes: 2(q-1)·alpha1 + 2(q-1)/q·n·beta1 + (q-1)/q·n·gamma1 for a ring inside, and the cost
    of `across` for N ranks and n/q bytes, the q ranks of a node sharing one network card: beta2' = q·beta2.
    """
    return ring(local_size, n_bytes, inside) + across(nodes, n_bytes / local_size, between.shared_by(local_size))


def _core_levels(size: int) -> int:
    return size.bit_length() - 1


def _fold(size: int, n_bytes: float, link: LinkCost) -> float:
    if size & (size - 1) == 0:
        return 0.0
    return 2 * link.message_seconds(n_bytes) + link.gamma_seconds_per_byte * n_bytes


def _looking_ahead(size: int, n_bytes: float, link: LinkCost, segments: int) -> float:
    piece = n_bytes / size / segments
    message, reduction = link.message_seconds(piece), link.gamma_seconds_per_byte * piece
    count = (size - 1) * segments
    return max(2 * count * message, count * reduction + (count - segments + 2) * message)


def _chain(size: int, n_bytes: float, link: LinkCost, segments: int) -> float:
    if size == 1:
        return 0.0
    per_byte = 2 * link.beta_seconds_per_byte + link.gamma_seconds_per_byte
    return (size + segments - 2) * (2 * link.alpha_seconds + n_bytes / segments * per_byte)


def _segment_count(n_bytes: float, segment_bytes: int | None) -> int:
    if segment_bytes is None:
        return 1
    if segment_bytes < 1:
        raise ValueError(f"segment_bytes is {segment_bytes}, allowed are 1 and more, or None for no segments")
    return max(1, math.ceil(n_bytes / segment_bytes))


def _segment_bytes(n_bytes: float, segments: int) -> int:
    return math.ceil(n_bytes / segments / LINE_BYTES) * LINE_BYTES


def _least(convex: Callable[[int], float], low: int, high: int) -> int:
    """Return the integer in low..high at which a convex function is least, the smallest of equals."""
    while low < high:
        middle = (low + high) // 2
        if convex(middle) <= convex(middle + 1):
            high = middle
        else:
            low = middle + 1
    return low
