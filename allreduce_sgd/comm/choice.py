"""Which all-reduce algorithm serves which message size: a table that is the same on all ranks.

It is named by the user, or made from measurements (`measure.py`), and goes into checkpoints, so that a resumed run adds
in the same order.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from allreduce_sgd.comm.base import AlgorithmTable
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules.catalogue import ALL_REDUCE

__all__ = [
    "LIBRARY",
    "SHARED_MEMORY",
    "TWO_LEVEL",
    "Choice",
    "Entry",
    "default_between",
    "default_choice",
    "merge",
    "named_choice",
]

LIBRARY = "mpi"
SHARED_MEMORY = "shared-memory"
TWO_LEVEL = "two-level"

# Large enough that a message's latency does not count, small enough that several are under way in a chunk of a bucket.
_SEGMENT_BYTES = 1 << 20
_SMALL_BETWEEN_BYTES = 256 * 1024


class Entry(NamedTuple):
    """`algorithm` serves messages of up to `limit_bytes`, None: of any size; `segment_bytes` None: uncut."""

    limit_bytes: int | None
    algorithm: str
    segment_bytes: int | None = None

    def describe(self) -> str:
        cut = "" if self.segment_bytes is None else f" in segments of {self.segment_bytes:,} bytes"
        return f"{self.algorithm}{cut}"


@dataclass(frozen=True)
class Choice:
    """`messages` for what is all-reduced, `between` for the part of it that goes between nodes on two levels.

    Entries ascend in their limits, and the last has none.
    """

    messages: tuple[Entry, ...]
    between: tuple[Entry, ...]

    def for_message(self, n_bytes: int) -> Entry:
        return _first(self.messages, n_bytes)

    def for_between(self, n_bytes: int) -> Entry:
        return _first(self.between, n_bytes)

    @property
    def name(self) -> str:
        """The algorithm that serves the largest messages."""
        return self.messages[-1].algorithm

    @property
    def order_free_of_chunks(self) -> bool:
        """Whether an element is added in the same order whatever the size of the message, between nodes too."""
        return all(
            entry.algorithm in (SHARED_MEMORY, TWO_LEVEL)
            or (entry.algorithm in ALL_REDUCE and ALL_REDUCE[entry.algorithm].order_free_of_chunks)
            for entry in (*self.messages, *self.between)
        )

    def suits(self, nodes: int, shared_memory: bool) -> bool:
        """Say whether ranks on so many nodes can use the table."""
        names = {entry.algorithm for entry in self.messages}
        if SHARED_MEMORY in names and nodes > 1:
            return False
        return shared_memory or not names & {SHARED_MEMORY, TWO_LEVEL}

    def describe(self, nodes: int) -> str:
        """Return the table for people: a line per entry."""
        groups = [("all-reduce of", self.messages)]
        if nodes > 1:
            groups.append(("between nodes", self.between))
        lines = []
        for what, entries in groups:
            for entry in entries:
                limit = "more" if entry.limit_bytes is None else f"up to {entry.limit_bytes:,} bytes"
                lines.append(f"{what} {limit}: {entry.describe()}")
        return "\n".join(lines)

    def to_lists(self) -> AlgorithmTable:
        """Return the table in the form in which JSON keeps it."""
        return [[list(entry) for entry in entries] for entries in (self.messages, self.between)]

    @staticmethod
    def from_lists(lists: Sequence[Sequence[Sequence[int | str | None]]]) -> "Choice":
        """The inverse of `to_lists`. Raises ValueError where the lists are not such a table."""
        try:
            messages, between = (tuple(_entry(row) for row in rows) for rows in lists)
        except TypeError as problem:
            raise ValueError(f"{lists} is no table of algorithms") from problem
        for entries in (messages, between):
            limits = [math.inf if entry.limit_bytes is None else entry.limit_bytes for entry in entries]
            if not limits or limits[-1] != math.inf or any(low >= high for low, high in itertools.pairwise(limits)):
                raise ValueError(f"a table of algorithms must ascend and end with one for all sizes, unlike {lists}")
        if any(entry.algorithm not in ALL_REDUCE for entry in between):
            raise ValueError(f"between nodes only schedules serve, unlike in {lists}")
        return Choice(messages, between)


def named_choice(name: str, nodes: int, shared_memory: bool, deterministic: bool) -> Choice:
    """Return the table that uses one algorithm for all sizes. Raises ConfigError where it does not suit.

    `deterministic` allows those alone whose order of summation does not depend on how the data are cut.
    """
    if name == SHARED_MEMORY and nodes > 1:
        raise ConfigError(f"--algorithm {name}: the ranks are on {nodes} nodes; choose two-level or auto")
    if name in (SHARED_MEMORY, TWO_LEVEL) and not shared_memory:
        raise ConfigError(
            f"--algorithm {name}: the ranks of a node cannot share memory here (containers of their own, or too little "
            f"free memory); choose auto, ring or another that sends messages"
        )
    independent = name in (SHARED_MEMORY, TWO_LEVEL) or (name in ALL_REDUCE and ALL_REDUCE[name].order_free_of_chunks)
    if deterministic and not independent:
        free = [SHARED_MEMORY, TWO_LEVEL, *(key for key, value in ALL_REDUCE.items() if value.order_free_of_chunks)]
        raise ConfigError(
            f"--deterministic: {name} adds in an order that depends on the size of messages; choose --algorithm auto, "
            f"{', '.join(free)}"
        )
    segment = _SEGMENT_BYTES if name in ALL_REDUCE and ALL_REDUCE[name].segmented else None
    return Choice((Entry(None, name, segment),), default_between(deterministic))


def default_between(deterministic: bool) -> tuple[Entry, ...]:
    """Return what goes between nodes where nothing was measured."""
    if deterministic:
        # Both add along the same tree of ranks, so that the limit between them changes no bit.
        return (Entry(_SMALL_BETWEEN_BYTES, "recursive-doubling"), Entry(None, "halving-doubling"))
    return (
        Entry(_SMALL_BETWEEN_BYTES, "halving-doubling"),
        Entry(None, "segmented-ring", _SEGMENT_BYTES),
    )


def default_choice(nodes: int, shared_memory: bool, deterministic: bool) -> Choice:
    """Return the table of `--algorithm auto` where nothing was measured.

    `deterministic`: no size changes the order of summation.
    """
    between = default_between(deterministic)
    if shared_memory:
        return Choice((Entry(None, SHARED_MEMORY if nodes == 1 else TWO_LEVEL),), between)
    return Choice(between, between)


def merge(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Return ascending entries with neighbours of one algorithm made one, and the last one for all larger sizes too.

    Of several segment sizes the largest message's counts.
    """
    merged: list[Entry] = []
    for entry in entries:
        if merged and merged[-1].algorithm == entry.algorithm:
            merged.pop()
        merged.append(entry)
    merged[-1] = merged[-1]._replace(limit_bytes=None)
    return tuple(merged)


def _first(entries: tuple[Entry, ...], n_bytes: int) -> Entry:
    return next(entry for entry in entries if entry.limit_bytes is None or n_bytes <= entry.limit_bytes)


def _entry(row: Sequence[int | str | None]) -> Entry:
    limit, name, segment = row
    known = isinstance(name, str) and (name in (LIBRARY, SHARED_MEMORY, TWO_LEVEL) or name in ALL_REDUCE)
    whole = all(number is None or (type(number) is int and number > 0) for number in (limit, segment))
    if not known or not whole:
        raise ValueError(f"{list(row)} is no entry of a table of algorithms")
    return Entry(limit, name, segment)  # type: ignore[arg-type]  # checked just now
