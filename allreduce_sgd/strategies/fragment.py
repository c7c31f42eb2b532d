"""A part of the model that is exchanged at once: its buckets, and the exchange of them that is under way.

What travels: without a codec w_i x_i, which adds up to the mean; with one w_i (z - x_i), which is small where ranks
agree, so that little is lost. w_i are shares of samples, written as a quotient of numbers that a float holds exactly
(samples over a power of two, and the sum is divided by all samples over the same): weights that do not add up to 1 by
half a unit in the last place would let the model grow or shrink a little with every exchange.

For a plain average without codec and delay the parameters themselves lie in the communicator's memory and are reduced
in place: where ranks have seen equally many samples, the all-reduce is all there is to do. Else there is a pass that
writes w_i x_i into the communicator's memory, the all-reduce, and one that copies the mean into the parameters; other
methods, codecs and delays add one each for the anchor, the difference, and what was sent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.compression.base import Codec, CodecFactory
from allreduce_sgd.gradients.buckets import SPACING, Bucket, build_buckets
from allreduce_sgd.gradients.exchange import Flight, Rounds
from allreduce_sgd.strategies.method import Method

__all__ = ["Fragment", "Seen", "copy_quotient", "fill", "split_evenly"]

Seen = tuple[int, int]
"""How many samples there were up to some moment: of this rank, and of all."""


@dataclass
class Piece:
    """One bucket, in flat tensors of one length.

    `anchor` is z, `momentum` what the outer step keeps, `sent` x as it was sent.
    """

    signal: Bucket
    anchor: Bucket | None
    momentum: Tensor
    sent: Bucket | None
    codec: Codec | None
    result: Tensor | None = None
    """The sum over ranks of what they sent, until the next exchange."""
    shared: Bucket | None = None
    """A view of the last result that lay outside of the signal's memory."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.signal.parameters)

    def summed(self) -> Bucket:
        """The result, as a bucket; its buffer may be read only."""
        assert self.result is not None
        for known in (self.signal, self.shared):
            if known is not None and known.buffer.data_ptr() == self.result.data_ptr():
                return known
        self.shared = Bucket(self.signal.parameters, self.result, self.signal.spacing)
        return self.shared

    def mean(self, divisor: float) -> Bucket:
        """The result divided by `divisor`, which then lies in the signal's memory; it may be read only."""
        total = self.summed()
        if divisor == 1:
            return total
        torch.div(total.buffer, divisor, out=self.signal.buffer)
        return self.signal


class Fragment:
    """The exchanges of some parameters, one after another. All ranks must construct it together.

    `due` is the step at which the next exchange starts, `arrival` that at which the one under way is to be taken over,
    None if there is none. `base` tells the samples that there were when the exchange last taken over started, `started`
    when the last one did. `in_place`: the parameters lie in the communicator's memory, until `release`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        comm: Communicator,
        bucket_bytes: float,
        method: Method,
        compression: CodecFactory | None,
        keeps_sent: bool,
    ) -> None:
        self.due = 0
        self.arrival: int | None = None
        self.base: Seen = (0, 0)
        self.started: Seen = (0, 0)
        self._comm = comm
        self._weighs_samples = method.weighs_samples
        self._flights: list[Flight] = []
        anchored = compression is not None or not method.averages
        self.in_place = not anchored and not keeps_sent
        self._divisor = 1.0
        signals = build_buckets(parameters, comm, bucket_bytes, bucket_bytes, SPACING if self.in_place else 1)
        if self.in_place:
            for signal in signals:
                _move_into(signal)
        self.pieces = [
            Piece(
                signal,
                _private(signal) if anchored else None,
                signal.buffer.new_zeros(signal.buffer.numel() if method.keeps_momentum and anchored else 0),
                _private(signal) if keeps_sent else None,
                None if compression is None else compression(signal.slots),
            )
            for signal in signals
        ]
        self.parameters = [parameter for piece in self.pieces for parameter in piece.parameters]
        codecs = [piece.codec for piece in self.pieces if piece.codec is not None]
        self.codecs = codecs
        self.rounds = max((codec.rounds for codec in codecs), default=1)

    def begin(self, due: int, seen: Seen) -> None:
        """Take the parameters, equal on all ranks, as the anchor; the first exchange is due at step `due`."""
        self.due, self.arrival = due, None
        self.base = self.started = seen
        for piece in self.pieces:
            if piece.anchor is not None:
                torch._foreach_copy_(piece.anchor.slots, piece.parameters)

    def weight(self, since: Seen, now: Seen) -> tuple[float, float]:
        """Return what this rank's model is multiplied by for a sum, and what the sum is divided by for the mean."""
        samples, total = (now[0] - since[0], now[1] - since[1]) if self._weighs_samples else (1, self._comm.size)
        unit = 1 << (total - 1).bit_length()
        return samples / unit, total / unit

    def start(self, arrival: int, now: Seen, blocking: bool, even: bool, measured: bool) -> None:
        """Send the parameters as they are. All ranks must call, with no exchange under way.

        `blocking`: it may wait. `even`: all ranks have seen equally many samples since `base`, as all of them know.
        `measured`: `squared_distance` will be asked for.
        """
        self.arrival, self.started = arrival, now
        factor, divisor = self.weight(self.base, now)
        # The all-reduce divides on its way.
        equal = self.in_place and even
        self._divisor = 1.0 if equal else divisor
        last = len(self.pieces) - 1
        for index, piece in enumerate(self.pieces):
            if self.in_place:
                _move_into(piece.signal)
                if measured:
                    piece.sent = Bucket(piece.signal.parameters, piece.signal.buffer.clone(), SPACING)
                # Shares of a mini-batch that could be equal are, unless they were cut by somebody else: then this rank
                # alone makes up for it, and all reduce alike.
                lift = factor * self._comm.size / divisor if equal else factor
                if lift != 1:
                    piece.signal.buffer.mul_(lift)
            elif piece.codec is None:
                fill(piece.signal, factor)
            else:
                assert piece.anchor is not None
                for before, parameter, slot in zip(
                    piece.anchor.slots, piece.parameters, piece.signal.slots, strict=True
                ):
                    torch.sub(before, parameter, out=slot)
                piece.signal.buffer.mul_(factor / divisor)
            if piece.sent is not None and not self.in_place:
                torch._foreach_copy_(piece.sent.slots, piece.parameters)
            # The last one ends after all others.
            op = ReduceOp.AVERAGE if equal else ReduceOp.SUM
            self._flights.append(Flight(self._sum(piece, op, blocking and index == last)))

    def advance(self) -> None:
        """Have exchanges of several rounds go on. All ranks must call, at the same points."""
        for flight in self._flights:
            flight.advance()

    def land(self) -> None:
        """Wait for the exchange under way, if there is one. All ranks must call, at the same points."""
        for flight in self._flights:
            flight.land()
        self._flights.clear()

    def take_over(self, method: Method, lr: float) -> None:
        """Move the anchor and the parameters by the exchange under way, which has landed."""
        divisor = self._divisor
        for piece in self.pieces:
            if self.in_place:
                piece.sent = None
                if divisor != 1:
                    piece.signal.buffer.div_(divisor)
            elif piece.anchor is not None:
                pull = piece.summed().buffer
                if piece.codec is None:
                    pull = torch.sub(piece.anchor.buffer, piece.mean(divisor).buffer, out=piece.signal.buffer)
                method.arrive(piece.parameters, piece.anchor, pull, piece.momentum, piece.sent, lr)
            elif piece.sent is not None:
                method.merge(piece.parameters, piece.mean(divisor), piece.sent)
            else:
                copy_quotient(piece.summed(), divisor)
        self.base, self.arrival = self.started, None

    def squared_distance(self) -> float:
        """Return the squared L2 distance of this rank's model, as sent, from the mean, before it is taken over.

        With a codec the mean is what the codecs let through of it. Two passes over memory.
        """
        return sum(float(torch.linalg.vector_norm(_difference(piece, self._divisor))) ** 2 for piece in self.pieces)

    def release(self) -> None:
        """Give the parameters private memory, which outlives the communicator. All ranks must call."""
        self.land()
        if self.in_place:
            for parameter in self.parameters:
                parameter.data = parameter.detach().clone()
        self.in_place = False

    def state_dict(self) -> dict[str, Any]:
        """Return all that it keeps, once what is under way has landed; tensors are not copied. All ranks must call."""
        self.land()
        under_way = self.arrival is not None
        return {
            "due": self.due,
            "arrival": self.arrival,
            "base": list(self.base),
            "started": list(self.started),
            "anchors": [piece.anchor.buffer for piece in self.pieces if piece.anchor is not None],
            "momenta": [piece.momentum for piece in self.pieces],
            "sent": [piece.sent.buffer for piece in self.pieces if piece.sent is not None] if under_way else [],
            # Memory that ranks share is not written to files as it lies.
            "results": [piece.result.clone() for piece in self.pieces if piece.result is not None] if under_way else [],
            "codecs": [codec.state_dict() for codec in self.codecs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.land()
        self.due, self.arrival = state["due"], state["arrival"]
        self.base = state["base"][0], state["base"][1]
        self.started = state["started"][0], state["started"][1]
        _, self._divisor = self.weight(self.base, self.started) if self.arrival is not None else (0.0, 1.0)
        anchors = [piece.anchor.buffer for piece in self.pieces if piece.anchor is not None]
        momenta = [piece.momentum for piece in self.pieces]
        torch._foreach_copy_(anchors + momenta, state["anchors"] + state["momenta"])
        if self.arrival is not None:
            for piece, result in zip(self.pieces, state["results"], strict=True):
                piece.result = result.to(piece.signal.buffer.device, copy=True)
            kept = [piece.sent.buffer for piece in self.pieces if piece.sent is not None]
            torch._foreach_copy_(kept, state["sent"])
        for codec, saved in zip(self.codecs, state["codecs"], strict=True):
            codec.load_state_dict(saved)

    def _sum(self, piece: Piece, op: ReduceOp, blocking: bool) -> Rounds:
        if piece.codec is not None:
            piece.result, _ = yield from piece.codec.reduce(piece.signal.buffer, self._comm)
            return
        work = self._comm.all_reduce(piece.signal.buffer, op, shared_result=not self.in_place, blocking=blocking)
        yield work
        piece.result = work.wait()


def fill(bucket: Bucket, factor: float) -> None:
    """Write the parameters, times `factor`, into the bucket."""
    for parameter, slot in zip(bucket.parameters, bucket.slots, strict=True):
        torch.mul(parameter, factor, out=slot)


def copy_quotient(bucket: Bucket, divisor: float) -> None:
    """Write what the bucket holds, divided by `divisor`, into the parameters."""
    if divisor == 1:
        torch._foreach_copy_(tuple(bucket.parameters), bucket.slots)
        return
    for parameter, slot in zip(bucket.parameters, bucket.slots, strict=True):
        torch.div(slot, divisor, out=parameter)


def split_evenly(parameters: Sequence[nn.Parameter], parts: int) -> list[list[nn.Parameter]]:
    """Share parameters out so that the parts have about equally many bytes; within a part their order stays.

    The largest first, each to the part that has least: no part is empty if there are as many parameters as parts.
    """
    members: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(parameters)), key=lambda index: -parameters[index].nbytes):
        # Parameters without elements count too, so that parts get their share of them.
        least = min(range(parts), key=lambda part: (loads[part], len(members[part])))
        members[least].append(index)
        loads[least] += parameters[index].nbytes
    return [[parameters[index] for index in sorted(part)] for part in members]


def _move_into(bucket: Bucket) -> None:
    """Have the parameters of a bucket lie in it, also where somebody else has given them other memory."""
    for parameter, slot in zip(bucket.parameters, bucket.slots, strict=True):
        if parameter.data_ptr() != slot.data_ptr():
            with torch.no_grad():
                slot.copy_(parameter)
            parameter.data = slot


def _private(like: Bucket) -> Bucket:
    return Bucket(like.parameters, torch.zeros_like(like.buffer), like.spacing)


def _difference(piece: Piece, divisor: float) -> Tensor:
    """Return x as it was sent minus the mean, flat: in the signal's memory, where the result does not lie there."""
    total = piece.summed()
    # What was sent is not needed any more.
    out = _private(piece.signal) if total is piece.signal else piece.signal
    if piece.codec is None:
        subtrahend, factor = total, 1 / divisor
    else:
        assert piece.anchor is not None
        subtrahend, factor = piece.anchor, 1.0
    if piece.sent is not None:
        torch.sub(piece.sent.buffer, subtrahend.buffer, alpha=factor, out=out.buffer)
    else:
        for parameter, slot, into in zip(piece.parameters, subtrahend.slots, out.slots, strict=True):
            torch.sub(parameter, slot, alpha=factor, out=into)
    return out.buffer if piece.codec is None else out.buffer.add_(total.buffer)
