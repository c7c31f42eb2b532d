"""Step diagrams of all-reduce algorithms, drawn from the schedules themselves, so that they cannot differ from them.

A diagram has a column for each rank and a row for each round. A rank's buffer is a bar, a cell for each of its parts,
filled as far as the part's sum has come: 1/P of a cell for each rank that is in it. An arrow is a message, from what is
sent to where it is received, labelled with that slice of the buffer.

Rounds, messages and what they do to the buffers come from the columnar form of a schedule, which is tested to equal
the generators that run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import Network, multi_lane
from allreduce_sgd.schedules.step import Column, Columnar

__all__ = ["DIAGRAMS", "Diagram", "Message", "draw", "progress", "rounds"]

Sums = list[list[frozenset[int]]]
"""For each rank and each element of its buffer, the ranks whose elements are in it."""

_BAR_WIDTH, _BAR_HEIGHT = 84.0, 16.0
_LEFT, _TOP, _ROUND = 66.0, 40.0, 76.0
# Of all columns together, so that the usual numbers of ranks fit a page.
_WIDTH = 616.0
_HEAD = 7.0
# Of a label from the sender, where arrows that cross are still apart; less on flat arrows, which cross sooner.
_LABEL_DISTANCE, _FLAT_LABEL_DISTANCE, _FLAT_WIDTH = 30.0, 14.0, 190.0


class Message(NamedTuple):
    """Elements `send` of one rank that become, or are added to, elements `receive` of another."""

    sender: int
    receiver: int
    send: slice
    receive: slice
    reduce: bool


@dataclass(frozen=True)
class Diagram:
    """What is drawn: `elements` are the parts into which a buffer is cut on `ranks` ranks."""

    title: str
    columns: Columnar
    elements: Callable[[int], int]
    ranks_per_node: int | None = None


_FREE = LinkCost(0.0, 0.0, 0.0)

DIAGRAMS: Mapping[str, Diagram] = MappingProxyType(
    {
        "ring": Diagram("Ring", ALL_REDUCE["ring"].columns(None), lambda ranks: ranks),
        "segmented-ring": Diagram(
            "Segmented ring, two segments to a chunk", ALL_REDUCE["segmented-ring"].columns(1), lambda ranks: 2 * ranks
        ),
        "recursive-doubling": Diagram(
            "Recursive doubling", ALL_REDUCE["recursive-doubling"].columns(None), lambda ranks: 4
        ),
        "halving-doubling": Diagram("Halving-doubling", ALL_REDUCE["halving-doubling"].columns(None), lambda ranks: 4),
        "tree": Diagram("Binomial tree", ALL_REDUCE["tree"].columns(None), lambda ranks: 4),
        "chain": Diagram("Pipelined chain, three segments", ALL_REDUCE["chain"].columns(1), lambda ranks: 3),
        "two-level": Diagram(
            "Two levels, nodes of two ranks",
            multi_lane(ALL_REDUCE["ring"].columns(None), Network(_FREE, ranks_per_node=2)),
            lambda ranks: ranks,
            ranks_per_node=2,
        ),
    }
)
"""The diagrams by the name of their algorithm; segments are one element long."""


def rounds(columns: Columnar, size: int, length: int) -> Iterator[list[Message]]:
    """Yield the messages of each round, in the order of their senders; those of no elements are left out."""
    for column in columns(size, length):
        yield [
            _message(column, sender)
            for sender in range(size)
            if column.sends[sender] and column.send_stop[sender] > column.send_start[sender]
        ]


def progress(steps: Sequence[Sequence[Message]], size: int, length: int) -> Iterator[Sums]:
    """Yield what the buffers hold at the beginning and after each round. Messages of a round carry what was before."""
    sums: Sums = [[frozenset({rank})] * length for rank in range(size)]
    yield sums
    for step in steps:
        after = [list(row) for row in sums]
        for message in step:
            sent = sums[message.sender][message.send]
            kept = after[message.receiver][message.receive]
            after[message.receiver][message.receive] = (
                [old | new for old, new in zip(kept, sent, strict=True)] if message.reduce else sent
            )
        sums = after
        yield sums


def draw(name: str, size: int) -> str:
    """Return the diagram of an algorithm on `size` ranks as an SVG image, without an empty line."""
    diagram = DIAGRAMS[name]
    length = diagram.elements(size)
    steps = list(rounds(diagram.columns, size, length))
    sheet = _Sheet(size, length, len(steps))
    lines = [
        f'<svg class="schedule" viewBox="0 0 {sheet.width:g} {sheet.height:g}" width="{sheet.width:g}" '
        f'height="{sheet.height:g}" role="img" aria-label="{diagram.title}, {size} ranks, {len(steps)} rounds">'
    ]
    if diagram.ranks_per_node is not None:
        lines += sheet.nodes(diagram.ranks_per_node)
    lines += [_text(sheet.center(rank), 20, f"rank {rank}", "rank") for rank in range(size)]
    lines += [_text(8, sheet.top(index) + 50, f"round {index + 1}", "round") for index in range(len(steps))]
    for index, sums in enumerate(progress(steps, size, length)):
        for rank, row in enumerate(sums):
            lines += sheet.bar(rank, index, row)
    numbered = [(message, index) for index, step in enumerate(steps) for message in step]
    lines += [sheet.arrow(*each) for each in numbered]
    # Above all arrows, so that none goes through them.
    lines += [sheet.label(*each) for each in numbered]
    return "\n".join([*lines, "</svg>"])


def _message(column: Column, sender: int) -> Message:
    receiver = int(column.send_to[sender])
    return Message(
        sender,
        receiver,
        slice(int(column.send_start[sender]), int(column.send_stop[sender])),
        slice(int(column.recv_start[receiver]), int(column.recv_stop[receiver])),
        bool(column.reduce[receiver]),
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


class _Sheet:
    """Where things lie in a diagram: a column for each rank, a row of bars before and after every round."""

    def __init__(self, size: int, length: int, steps: int) -> None:
        self._size, self._length = size, length
        self._pitch = _WIDTH / size
        self.width, self.height = _LEFT + _WIDTH, self.top(steps) + _BAR_HEIGHT + 10

    def center(self, rank: int) -> float:
        return _LEFT + (rank + 0.5) * self._pitch

    def top(self, index: int) -> float:
        return _TOP + index * _ROUND

    def bar(self, rank: int, index: int, sums: Sequence[frozenset[int]]) -> Iterator[str]:
        left, top, cell = self.center(rank) - _BAR_WIDTH / 2, self.top(index), _BAR_WIDTH / self._length
        for element, ranks in enumerate(sums):
            x, fill = left + element * cell, _BAR_HEIGHT * len(ranks) / self._size
            place = f'x="{x:.1f}" width="{cell:.1f}"'
            yield f'<rect class="sum" {place} y="{top + _BAR_HEIGHT - fill:.1f}" height="{fill:.1f}"/>'
            yield f'<rect class="cell" {place} y="{top:.1f}" height="{_BAR_HEIGHT:g}"/>'

    def nodes(self, ranks_per_node: int) -> Iterator[str]:
        for first in range(0, self._size, ranks_per_node):
            x, width = _LEFT + first * self._pitch + 6, ranks_per_node * self._pitch - 12
            yield f'<rect class="node" x="{x:g}" y="1" width="{width:g}" height="{self.height - 2:g}" rx="8"/>'

    def arrow(self, message: Message, index: int) -> str:
        x1, y1, x2, y2 = self._ends(message, index)
        distance = math.hypot(x2 - x1, y2 - y1)
        along_x, along_y = _HEAD * (x2 - x1) / distance, _HEAD * (y2 - y1) / distance
        x, y = x2 - along_x, y2 - along_y
        return (
            f'<g class="message {"reduce" if message.reduce else "copy"}" data-round="{index}" '
            f'data-from="{message.sender}" data-to="{message.receiver}" '
            f'data-slice="{message.send.start}:{message.send.stop}">'
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>'
            f'<polygon points="{x2:.1f},{y2:.1f} {x - along_y / 2:.1f},{y + along_x / 2:.1f} '
            f'{x + along_y / 2:.1f},{y - along_x / 2:.1f}"/></g>'
        )

    def label(self, message: Message, index: int) -> str:
        x1, y1, x2, y2 = self._ends(message, index)
        wanted = _LABEL_DISTANCE if abs(x2 - x1) < _FLAT_WIDTH else _FLAT_LABEL_DISTANCE
        part = min(0.45, wanted / math.hypot(x2 - x1, y2 - y1))
        text = f"{message.send.start}:{message.send.stop}"
        return _text(x1 + part * (x2 - x1), max(y1 + part * (y2 - y1) + 4, y1 + 13), text, "slice")

    def _ends(self, message: Message, index: int) -> tuple[float, float, float, float]:
        """Return where an arrow begins, below the sender's bar, and where it ends, above the receiver's."""
        x1, x2 = self._middle(message.sender, message.send), self._middle(message.receiver, message.receive)
        return x1, self.top(index) + _BAR_HEIGHT + 1, x2, self.top(index + 1) - 1

    def _middle(self, rank: int, part: slice) -> float:
        return self.center(rank) + _BAR_WIDTH * ((part.start + part.stop) / (2 * self._length) - 0.5)
