"""The unit of every schedule: one step of one rank, and how a buffer is cut into chunks."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "NOTHING",
    "Booleans",
    "Column",
    "Columnar",
    "Integers",
    "Schedule",
    "Step",
    "chunk",
    "chunks",
    "segment_count",
    "segment_of",
]

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

NOTHING = slice(0, 0)


class Step(NamedTuple):
    """What one rank does at once: its send and its receive are posted together and both end before the next step.

    Slices count elements of the buffer. `reduce` says whether what arrives is combined into `recv` or overwrites it.
    Combining waits until the rank's own send of the same step has ended, so there the two slices may overlap (two ranks
    that exchange their whole buffers); where `reduce` is False they are disjoint. A step whose slice is empty moves no
    message: sender and receiver both see the same length. A step that does not receive has `reduce` False.
    """

    send_to: int | None
    send: slice
    recv_from: int | None
    recv: slice
    reduce: bool


Schedule = Callable[[int, int, int], Iterator[Step]]
"""(rank, size, length) -> the steps of that rank."""


class Column(NamedTuple):
    """One round of all ranks at once: arrays of shape (size,), entry r being what rank r does.

    Every send of a round meets its receive in the same round. Where `sends` (`receives`) is False the rank does not
    send (receive) in this round, and the entries of that half mean nothing; a rank with neither is idle and has no
    step in this round. The arrays may be shared between rounds and be read-only: copy before writing to them.
    """

    sends: Booleans
    send_to: Integers
    send_start: Integers
    send_stop: Integers
    receives: Booleans
    recv_from: Integers
    recv_start: Integers
    recv_stop: Integers
    reduce: Booleans


Columnar = Callable[[int, int], Iterator[Column]]
"""(size, length) -> the rounds; row r of them, without the idle ones, is the Schedule of rank r."""


def chunk(length: int, parts: int, index: int) -> slice:
    """Return chunk `index` (taken modulo `parts`) of `length` elements cut into `parts` contiguous chunks.

    Chunks differ by at most one element; the first `length % parts` are the longer ones, and some are empty where
    `length < parts`.
    """
    index %= parts
    base, longer = divmod(length, parts)
    start = index * base + min(index, longer)
    return slice(start, start + base + (index < longer))


def chunks(length: int, parts: int, index: Integers) -> tuple[Integers, Integers]:
    """Return starts and stops of the chunks `index`, an array of values in 0..parts-1, as `chunk` does for one."""
    base, longer = divmod(length, parts)
    start = index * base + np.minimum(index, longer)
    return start, start + base + (index < longer)


def segment_count(length: int, segment: int | None) -> int:
    """Return into how many segments of at most `segment` elements `length` elements are cut; None does not cut.

    At least one, so that an empty buffer has as many steps as any other that is not cut. Raises ValueError unless
    `segment` is positive.
    """
    if segment is None:
        return 1
    if segment < 1:
        raise ValueError(f"segment is {segment} elements, allowed are 1 and more, or None for no segments")
    return max(1, -(-length // segment))


def segment_of(piece: slice, segment: int | None, index: int) -> slice:
    """Return segment `index` of `piece`: `segment` elements, fewer at its end, none beyond it. None does not cut."""
    if segment is None:
        return piece
    return slice(min(piece.start + index * segment, piece.stop), min(piece.start + (index + 1) * segment, piece.stop))
