"""Runs a schedule over MPI: the steps' sends and receives, several steps at a time.

A strict executor ends every step before it begins the next, and the network stands still while it adds. This one looks
`look_ahead` steps ahead: it posts a receive or a send as soon as no earlier step that is still going on touches the
same elements, so that one segment is on its way while the one before is being added, and receives are posted before
their messages come. Elements are combined in the schedule's order, whatever arrives first.

Messages between two ranks carry their number in the tag, since sends may start out of order, and what stands for the
operation, so that ranks that run different ones never take each other's messages (`ledger.py`).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch import Tensor

from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.progress import Program
from allreduce_sgd.comm.reduction import combine
from allreduce_sgd.schedules.step import Step

__all__ = ["Execution", "Scratch", "first_tag"]

# Of the messages between two ranks fewer than these are under way at once (`look_ahead`).
_TAGS = 64


def first_tag(stamp: int, largest_tag: int) -> int:
    """Return where the tags of the operation with this stamp begin; they all end below `largest_tag`."""
    return stamp % (largest_tag // _TAGS) * _TAGS


class Scratch:
    """Buffers of one device for what arrives to be added, kept from one operation to the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []

    def take(self, n_bytes: int) -> Tensor:
        for index, block in enumerate(self._free):
            if block.numel() >= n_bytes:
                return self._free.pop(index)
        # One that is too small would only lie about.
        del self._free[:1]
        return torch.empty(n_bytes, dtype=torch.uint8, device=self._device)

    def give(self, block: Tensor) -> None:
        self._free.append(block)


class _Message:
    """One half of a step: a send or a receive, not posted yet, under way, or done."""

    def __init__(self, peer: int, piece: slice, first_tag: int, numbers: Counter[int]) -> None:
        self.peer = peer
        self.piece = piece
        self.tag = first_tag + numbers[peer] % _TAGS
        self.request: Any = None
        self.done = False
        self.scratch: Tensor | None = None
        numbers[peer] += 1

    def blocked_by(self, others: Iterable["_Message | None"]) -> bool:
        """Say whether any of the others still uses elements of this one's."""
        return any(
            other is not None
            and not other.done
            and max(self.piece.start, other.piece.start) < min(self.piece.stop, other.piece.stop)
            for other in others
        )


class _Going(NamedTuple):
    """A step that is going on; a half that moves nothing is None."""

    send: _Message | None
    receive: _Message | None
    reduce: bool

    @property
    def done(self) -> bool:
        return (self.send is None or self.send.done) and (self.receive is None or self.receive.done)


class Execution:
    """One rank's run of a schedule on a flat tensor, in place, over the mpi4py communicator `comm`.

    The tensor lies in memory that MPI takes, and `scratch` in the same: on the CPU, or on a GPU if MPI is CUDA-aware.
    `op` combines what arrives in steps that reduce (AVERAGE adds); None where there are none. `count` is told the bytes
    of every message as it is handed to MPI. All ranks of `comm` must run the same schedule on as many elements, with
    the same `first_tag`.
    """

    def __init__(
        self,
        flat: Tensor,
        op: ReduceOp | None,
        comm: Any,
        scratch: Scratch,
        count: Callable[[int], None],
        first_tag: int = 0,
    ) -> None:
        self._flat = flat
        self._address = flat.data_ptr()
        self._item_bytes = flat.element_size()
        self._op = op
        self._comm = comm
        self._scratch = scratch
        self._count = count
        self._first_tag = first_tag
        self._going: deque[_Going] = deque()
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def run(self, steps: Iterable[Step], look_ahead: int, longest_bytes: int | None = None) -> Program:
        """Run the steps. Messages of more than `longest_bytes` are cut, on all ranks alike; None: none are."""
        upcoming = iter(steps if longest_bytes is None else self._cut(steps, longest_bytes))
        going = self._going
        moved = True
        while True:
            while len(going) < look_ahead and (step := next(upcoming, None)) is not None:
                current = self._admit(step)
                if not current.done:
                    going.append(current)
            if not going:
                return
            finished = False
            earlier: list[_Message | None] = []
            for current in going:
                finished |= self._advance(current, earlier)
                earlier += current[:2]
            while going and going[0].done:
                going.popleft()
            moved |= finished
            if not finished:
                yield moved
                moved = False

    def _cut(self, steps: Iterable[Step], longest_bytes: int) -> Iterator[Step]:
        longest = max(1, longest_bytes // self._item_bytes)
        for step in steps:
            for start in range(0, max(_length(step.send), _length(step.recv), 1), longest):
                yield step._replace(send=_part(step.send, start, longest), recv=_part(step.recv, start, longest))

    def _admit(self, step: Step) -> _Going:
        send = receive = None
        if step.send_to is not None and step.send.start < step.send.stop:
            send = _Message(step.send_to, step.send, self._first_tag, self._sent)
        if step.recv_from is not None and step.recv.start < step.recv.stop:
            receive = _Message(step.recv_from, step.recv, self._first_tag, self._received)
        return _Going(send, receive, step.reduce)

    def _advance(self, step: _Going, earlier: list[_Message | None]) -> bool:
        """Post and finish what no earlier message stands in the way of; say whether anything ended."""
        send, receive = step.send, step.receive
        ended = False
        if receive is not None and receive.request is None:
            if step.reduce:
                receive.scratch = self._scratch.take(self._bytes(receive.piece))
                receive.request = self._receive(receive, receive.scratch.data_ptr())
            elif not receive.blocked_by(earlier):
                receive.request = self._receive(receive, self._address + receive.piece.start * self._item_bytes)
        if send is not None and not send.done:
            if send.request is None and not send.blocked_by(earlier[1::2]):
                start = self._address + send.piece.start * self._item_bytes
                send.request = self._comm.Isend(self._block(start, send.piece), send.peer, send.tag)
                self._count(self._bytes(send.piece))
            if send.request is not None and send.request.Test():
                send.done = ended = True
        if receive is not None and not receive.done and receive.request is not None:
            if receive.scratch is None:
                if receive.request.Test():
                    receive.done = ended = True
            elif not receive.blocked_by([*earlier, send]) and receive.request.Test():
                self._combine(receive.piece, receive.scratch)
                receive.done = ended = True
        return ended

    def _combine(self, piece: slice, scratch: Tensor) -> None:
        assert self._op is not None
        into = self._flat[piece]
        combine(self._op, into, scratch[: self._bytes(piece)].view(self._flat.dtype), into)
        if into.is_cuda:
            # MPI knows nothing of streams: what it sends next must have been added by then.
            torch.cuda.current_stream(into.device).synchronize()
        self._scratch.give(scratch)

    def _receive(self, message: _Message, address: int) -> Any:
        return self._comm.Irecv(self._block(address, message.piece), message.peer, message.tag)

    def _block(self, address: int, piece: slice) -> list[Any]:
        return [MPI.buffer.fromaddress(address, self._bytes(piece)), MPI.BYTE]

    def _bytes(self, piece: slice) -> int:
        return _length(piece) * self._item_bytes


def _length(piece: slice) -> int:
    return int(piece.stop - piece.start)


def _part(piece: slice, start: int, length: int) -> slice:
    """Return `length` elements from element `start` of the piece, fewer or none where it ends before."""
    return slice(min(piece.start + start, piece.stop), min(piece.start + start + length, piece.stop))
