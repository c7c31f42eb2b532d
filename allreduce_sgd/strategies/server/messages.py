"""What workers and servers send one another: a header of fixed length, then tensors whose lengths both sides know.

A header is WIDTH float64 numbers: the kind, the sender's rank, and up to WIDTH - 2 numbers of the kind's own. All
headers have one tag, so that a server takes them from any rank as they come, and all tensors another one. Messages of
one sender with one tag arrive in the order they were sent in, so each sender's requests are served in order.

Bytes: 80 for a header. `training_bytes` counts what this rank has sent and received while `training` was set.
"""

from collections.abc import Sequence
from enum import IntEnum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.errors import CommunicationTimeout

__all__ = ["WIDTH", "Expected", "Kind", "Message", "Post"]

WIDTH = 10
# Beside the tags of compression.messages, and of users, who take small numbers.
_HEADER_TAG = 31250
_TENSOR_TAG = 31251


class Kind(IntEnum):
    LOAD = auto()
    """The parameters to begin with follow."""
    PUSH = auto()
    """A gradient follows. Numbers: learning rate, version it was computed at, whether tensors follow, whether it is
    finite, how many versions follow before it (a leaf's sum)."""
    FETCH = auto()
    """Asks for the parameters. Numbers: the least version that will do, whether for training."""
    MIX = auto()
    """A worker's parameters follow; asks for how much of them goes to the centre."""
    SETTLE = auto()
    """Asks for the version, once all gradients of the sender have been taken in."""
    OPEN = auto()
    """Asks to begin a stretch of tickets. Numbers: first step, step before which it ends."""
    TAKE = auto()
    """Asks for a ticket. Numbers: the report."""
    CLOSE = auto()
    """Asks to end the stretch."""
    TELL = auto()
    """Asks for what the server has counted."""
    SAVE = auto()
    """Take part in the checkpoint of this step."""
    DONE = auto()
    """The sender will not ask again."""
    ANSWER = auto()


_TRAINING = frozenset({Kind.PUSH, Kind.MIX, Kind.TAKE})


class Message(NamedTuple):
    kind: Kind
    source: int
    numbers: tuple[float, ...]


class Expected:
    """An answer on its way, whose header and tensors are received as soon as they come."""

    def __init__(self, source: int, header: Work, tensors: list[Work]) -> None:
        self._source = source
        self._header = header
        self._tensors = tensors

    def wait(self) -> Message:
        """Return the answer when all of it is there. Raises CommunicationTimeout at the communicator's deadline."""
        try:
            message = _read(self._header.wait())
            for work in self._tensors:
                work.wait()
        except CommunicationTimeout as late:
            raise CommunicationTimeout(
                f"rank {self._source}, which serves parameters, has not answered; it may itself wait for another rank "
                f"({late})"
            ) from late
        return message


class Post:
    """Sends and receives messages of this rank over `comm`. One thread uses it."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.training = False
        self.training_bytes = 0
        self._sending: dict[int, list[Work]] = {}

    def send(self, to: int, kind: Kind, numbers: Sequence[float] = (), tensors: Sequence[Tensor] = ()) -> None:
        """Start sending; the tensors (on the CPU, contiguous) must not change before `flush`."""
        header = torch.zeros(WIDTH, dtype=torch.float64)
        header[: 2 + len(numbers)] = torch.tensor([kind, self.comm.rank, *numbers], dtype=torch.float64)
        works = self._sending.setdefault(to, [])
        works.append(self.comm.send(header, to, _HEADER_TAG))
        works += [self.comm.send(tensor, to, _TENSOR_TAG) for tensor in tensors if tensor.numel()]
        self._count(header, *tensors)

    def flush(self, to: int | None = None) -> None:
        """Wait until everything sent, or everything sent to one rank, has left its memory."""
        for rank in list(self._sending) if to is None else [to]:
            for work in self._sending.pop(rank, []):
                work.wait()

    def expect(self, source: int, tensors: Sequence[Tensor] = ()) -> Expected:
        """Begin to receive one message from `source`, with these tensors."""
        header = torch.empty(WIDTH, dtype=torch.float64)
        work = self.comm.receive(header, source, _HEADER_TAG)
        self._count(header, *tensors)
        return Expected(source, work, self._receive(source, tensors))

    def ask(self, to: int, kind: Kind, numbers: Sequence[float] = (), answer: Sequence[Tensor] = ()) -> Message:
        """Send a request without tensors and wait for its answer, which fills the tensors `answer`."""
        expected = self.expect(to, answer)
        self.send(to, kind, numbers)
        return expected.wait()

    def listen(self) -> Work:
        """Begin to receive a header from any rank, which `read` takes from the Work."""
        return self.comm.receive(torch.empty(WIDTH, dtype=torch.float64), None, _HEADER_TAG)

    def read(self, header: Tensor) -> Message:
        """Return what a header says; a request counts as training where its kind, or the request, says so."""
        message = _read(header)
        fetch = message.kind is Kind.FETCH
        self.training = message.numbers[1] > 0 if fetch else message.kind in _TRAINING
        self._count(header)
        return message

    def take(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Receive the tensors that follow a header from `source`."""
        self._count(*tensors)
        for work in self._receive(source, tensors):
            work.wait()

    def _receive(self, source: int, tensors: Sequence[Tensor]) -> list[Work]:
        return [self.comm.receive(tensor, source, _TENSOR_TAG) for tensor in tensors if tensor.numel()]

    def _count(self, *tensors: Tensor) -> None:
        if self.training:
            self.training_bytes += sum(tensor.nbytes for tensor in tensors)


def _read(header: Tensor) -> Message:
    kind, source, *numbers = header.tolist()
    return Message(Kind(int(kind)), int(source), tuple(numbers))
