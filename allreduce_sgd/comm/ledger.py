"""What the ranks of a communicator have launched on it, in a form that can be compared: numbers, stamps and reports.

Every collective has a number, from 1, and a stamp: the number, and a hash of what it is and of all that were launched
before it. Equal stamps mean equal histories, so that one integer beside the data (in a message's tag, in a note between
the ranks of a node) keeps apart what does not belong together, and shows also that an operation long ago differed.

No communication here; `desync.py` exchanges the reports.
"""

import json
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from allreduce_sgd.comm.base import ReduceOp

__all__ = ["NEAR", "NUMBER_SHIFT", "Call", "Difference", "Entry", "Ledger", "Report", "Views"]

Call = tuple[str, int, torch.dtype | None, ReduceOp | None, str | None]
"""Operation, number of elements, dtype, how they are combined, and what else must be equal on all ranks."""

# Python is quickest with integers of up to 30 bits.
NUMBER_SHIFT = 30
_MASK = 2**NUMBER_SHIFT - 1
# Odd, so that no difference is ever multiplied away; 3 modulo 4, so that one in the order keeps all bits but one.
_FACTOR = 0x2F6CDD1F
_KEPT = 256
_CALLS_KEPT = 4096
# How many collectives before and after one a report tells of.
NEAR = 16
_NAMED = 8


class Entry(NamedTuple):
    """A collective that was launched, as other ranks are told of it."""

    number: int
    stamp: int
    operation: str
    what: str

    def describe(self) -> str:
        return f"{self.operation} no. {self.number}{self.what and f' of {self.what}'}"


class Ledger:
    """The collectives that this rank has launched on one communicator, of which the last are remembered."""

    def __init__(self) -> None:
        self.launched = 0
        self._hash = 0
        self._salts: dict[Call, int] = {}
        self._recent: deque[tuple[int, int, Call]] = deque(maxlen=_KEPT)

    def launch(self, call: Call) -> int:
        """Give the call the next number, and return its stamp, less than 2^60."""
        try:
            salt = self._salts[call]
        except KeyError:
            salt = self._salt(call)
        self._hash = history = self._hash * _FACTOR + salt & _MASK
        self.launched = number = self.launched + 1
        stamp = (number & _MASK) << NUMBER_SHIFT | history
        self._recent.append((number, stamp, call))
        return stamp

    def _salt(self, call: Call) -> int:
        if len(self._salts) >= _CALLS_KEPT:
            self._salts.clear()
        # Unlike hash(), the same in all processes.
        salt = self._salts[call] = zlib.crc32(" ".join(_texts(call)).encode()) & _MASK
        return salt

    def entries(self, numbers: Iterable[int]) -> list[Entry]:
        """Return those of the collectives that are remembered. Any thread may call."""
        wanted = set(numbers)
        return [Entry(number, stamp, *_texts(call)) for number, stamp, call in list(self._recent) if number in wanted]

    def around(self, numbers: Iterable[int]) -> list[Entry]:
        """Return what is remembered of the collectives shortly before and after each of these."""
        return self.entries({near for number in numbers for near in range(number - NEAR, number + NEAR)})


class Report(NamedTuple):
    """What one rank tells another. `asks`: for the other's report in return, with what it has launched near `about`.

    `question` numbers what a rank asks; an answer bears the number of its question, and what nobody asked for bears 0.
    `waits_in` is the number of the collective that is under way, None where none is. `elsewhere` names what the rank
    has under way beside this communicator's collectives.
    """

    asks: bool
    question: int
    about: int
    launched: int
    waits_in: int | None
    failure: str | None
    elsewhere: str | None
    entries: list[Entry]

    def to_bytes(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    @staticmethod
    def from_bytes(data: bytes | bytearray) -> "Report":
        values = json.loads(data)
        values["entries"] = [Entry(*entry) for entry in values["entries"]]
        return Report(**values)


class Difference(NamedTuple):
    """The first collective known to be not the same on all ranks.

    `ask_about` is the number of the one of which more should be known: the same, or an earlier one where it is not sure
    that there the ranks began to differ.
    """

    number: int
    ask_about: int
    text: str


class Views:
    """What is known of what every rank has launched. What has been launched does not change, so it is never stale."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._reports: dict[int, Report] = {}
        self._known: dict[int, dict[int, Entry]] = {}

    def add(self, rank: int, report: Report) -> None:
        self._reports[rank] = report
        self.add_entries(rank, report.entries)

    def add_entries(self, rank: int, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._known.setdefault(entry.number, {})[rank] = entry
        for number in sorted(self._known)[:-_KEPT]:
            del self._known[number]

    @property
    def numbers(self) -> list[int]:
        """Of which collectives something is known."""
        return list(self._known)

    def difference(self) -> Difference | None:
        """Return the first collective that is not the same on all ranks, None where none is known."""
        # No rank remembers what came before.
        same = max([0, *(report.launched - _KEPT for report in self._reports.values())])
        for number in sorted(self._known):
            stamps = {entry.stamp for entry in self._known[number].values()}
            if len(stamps) > 1:
                gap = number - same
                ask_about = number if gap == 1 else number - 1 if gap <= 2 * NEAR else number - gap // 2
                return Difference(number, ask_about, self._describe_difference(number))
            if len(self._known[number]) > 1:
                same = max(same, number)
        return None

    def knows_all_of(self, number: int, own_rank: int) -> bool:
        """Say whether every rank has told of this collective all that it can."""
        known = self._known.get(number, {})
        for rank in range(self._size):
            report = self._reports.get(rank)
            told = report is not None and not report.launched - _KEPT < number <= report.launched
            if rank != own_rank and rank not in known and not told:
                return False
        return True

    def failure(self) -> str | None:
        for rank, report in sorted(self._reports.items()):
            if report.failure is not None:
                return f"rank {rank} has failed: {report.failure}"
        return None

    def missing(self, own_rank: int, number: int) -> str:
        """Say which ranks have come to the collective `number`, which not, and where these are, as far as they told."""
        where = {}
        for rank in range(self._size):
            if rank != own_rank:
                where[rank] = self._where(rank, number)
        silent = [rank for rank, text in where.items() if text == ""]
        told = [f"rank {rank} {text}" for rank, text in where.items() if text]
        if len(told) > _NAMED:
            told[_NAMED:] = [f"{len(told) - _NAMED} more ranks have not come either"]
        if silent:
            told.append(f"{_ranks(silent)} {_have(silent)} not answered")
        if not told:
            return "all ranks have started it"
        come = sorted([own_rank, *(rank for rank, text in where.items() if text is None)])
        return f"{'; '.join(told)}; {_ranks(come)} {_have(come)} come to it"

    def _where(self, rank: int, number: int) -> str | None:
        """None: it has come; empty: nothing is known."""
        report = self._reports.get(rank)
        if report is None:
            return ""
        last = report.launched if report.waits_in is None else report.waits_in
        name = self._known[last][rank].describe() if rank in self._known.get(last, {}) else f"collective no. {last}"
        beside = "" if report.elsewhere is None else f" (under way there: {report.elsewhere})"
        if report.waits_in is not None and report.waits_in < number:
            started = "has not started it and " if report.launched < number else ""
            return f"{started}is still in {name}{beside}"
        if report.launched < number:
            return f"has not started it: {f'its last was {name}' if last else 'it has started nothing'}{beside}"
        return None

    def _describe_difference(self, number: int) -> str:
        ranks = sorted(self._known[number])
        entries = [self._known[number][rank] for rank in ranks]
        operations = {entry.operation for entry in entries}
        views: dict[str, list[int]] = {}
        for rank, entry in zip(ranks, entries, strict=True):
            text = entry.what if len(operations) == 1 else entry.operation + (entry.what and f" of {entry.what}")
            views.setdefault(text, []).append(rank)
        name = entries[0].operation if len(operations) == 1 else "collective"
        if len(views) == 1:
            return f"before {entries[0].describe()} {_ranks(ranks)} launched different collectives, long ago"
        told = ", ".join(f"{_ranks(group)} {_have(group)} {text}" for text, group in views.items())
        late = [rank for rank, report in sorted(self._reports.items()) if report.launched < number]
        if late:
            told += f"; {_ranks(late)} {_have(late)} not come to it"
        before = self._known.get(number - 1, {})
        if len(before) > 1:
            told += f" (the one before, {next(iter(before.values())).describe()}, was the same)"
        return f"{name} no. {number}: {told}"


def _texts(call: Call) -> tuple[str, str]:
    operation, numel, dtype, op, detail = call
    if dtype is None:
        return operation, ""
    how = ", ".join(part for part in (None if op is None else op.value, detail) if part is not None)
    return operation, f"{numel} {str(dtype).removeprefix('torch.')}{how and f' ({how})'}"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:_NAMED]))
    return f"ranks {shown}{f' and {len(ranks) - _NAMED} more' if len(ranks) > _NAMED else ''}"


def _have(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
