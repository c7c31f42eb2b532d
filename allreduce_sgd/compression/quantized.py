"""The exchange of all codecs that send every element in fewer bits: what the bits are, a `Quantizer` says.

Let c be the bytes of a whole signal, quantised. Two forms, by the number of ranks P:

- P ≤ 2, gathered: every rank sends its signal to all, and all add up what they got. (P-1) c bytes per rank, one phase.
  (Also over back ends without messages between two ranks, for any P.)
- P > 2, in two phases: a signal is cut into P rows, row r goes to rank r, which adds the rows up and sends the sum,
  quantised again, to all. 2(P-1)/P c bytes per rank: for P = 2 that would be the same bytes in twice as many phases.

The error of the second quantisation is the owner's: rank r adds its own row unquantised, and counts as its `sent` what
is missing to the sum that all receive. So u is the sum of what the ranks sent, and error feedback around the codec
takes back both errors with one residual (in two buffers: Tang et al., "DoubleSqueeze", ICML 2019, arXiv 1905.05957;
in blocks: Zheng, Huang and Kwok, "Communication-efficient distributed blockwise momentum SGD with error-feedback",
NeurIPS 2019, arXiv 1905.10936). Only narrower floats leave the second rounding, half a unit in the last place of the
sum, where it is, so that error feedback's law holds for them bit for bit.

Rows are of equal length, padded with zeros: by fewer than P elements, and fewer than a unit per block.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import Codec, Exchange
from allreduce_sgd.compression.messages import exchange_rows, has_messages
from allreduce_sgd.compression.workspace import Workspace

__all__ = ["Quantized", "Quantizer"]

_GATHERED_UP_TO = 2


class Quantizer(ABC):
    """Turns rows of float32 or float64 into rows of bytes, and back."""

    shifts_error: bool
    """Whether the error of a sum's quantisation is to be counted as the owner's, or left as rounding."""

    @abstractmethod
    def row(self, length: int) -> tuple[int, int]:
        """Return how many elements, and how many bytes, a row has that is to hold `length` elements."""

    @abstractmethod
    def encode(self, values: Tensor, wire: Tensor, length: int) -> None:
        """Write values of shape (rows, elements), which stay as they are, as uint8 of shape (rows, bytes).

        Of all rows together the first `length` elements count, the others are padding.
        """

    @abstractmethod
    def decode(self, wire: Tensor, values: Tensor) -> None:
        """Write what `encode` made of values, for any number of rows."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps nothing, this is another codec's state: {', '.join(state)}")


class Quantized(Codec):
    """The codec that sends signals as `quantizer` writes them. Keeps what the quantizer keeps.

    `size` is the number of ranks that there will be, None if any.
    """

    def __init__(self, quantizer: Quantizer, size: int | None = None) -> None:
        self.rounds = 1 if size is not None and size <= _GATHERED_UP_TO else 2
        self._quantizer = quantizer
        self._workspace = Workspace()

    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        if signal.numel() == 0:
            return signal.clone(), signal
        if comm.size <= _GATHERED_UP_TO or not has_messages(comm):
            u, sent = yield from self._gather(signal, comm)
        else:
            u, sent = yield from self._two_phases(signal, comm)
        if u.dtype is signal.dtype:
            return u, sent
        return self._workspace.like("narrow u", signal).copy_(u), self._workspace.like("narrow sent", signal).copy_(
            sent
        )

    def _gather(self, signal: Tensor, comm: Communicator) -> Exchange:
        length = signal.numel()
        values = self._rows(signal, 1)
        wire = self._bytes("gathered", comm.size, length, signal.device)
        self._quantizer.encode(values, wire[comm.rank : comm.rank + 1], length)
        yield comm.all_gather(wire.view(-1))
        decoded = self._floats("decoded", values, comm.size)
        self._quantizer.decode(wire, decoded)
        u = _add_up(decoded, self._floats("u", values, 1))
        return u.view(-1)[:length], decoded[comm.rank, :length]

    def _two_phases(self, signal: Tensor, comm: Communicator) -> Exchange:
        quantizer, size, length = self._quantizer, comm.size, signal.numel()
        values = self._rows(signal, size)
        own = slice(comm.rank, comm.rank + 1)
        row_length = -(-length // size)
        outgoing = self._bytes("outgoing", size, row_length, signal.device)
        incoming = self._bytes("incoming", size, row_length, signal.device)
        quantizer.encode(values, outgoing, length)
        messages = exchange_rows(outgoing, incoming, comm)
        # While they travel.
        sent = self._floats("sent", values, size)
        quantizer.decode(outgoing, sent)
        yield messages

        decoded = self._floats("decoded", values, size)
        quantizer.decode(incoming, decoded)
        decoded[own] = values[own] if quantizer.shifts_error else sent[own]
        total = _add_up(decoded, self._floats("total", values, 1))
        gathered = self._bytes("gathered", size, row_length, signal.device)
        start = comm.rank * values.shape[1]
        quantizer.encode(total, gathered[own], max(0, min(length - start, values.shape[1])))
        yield comm.all_gather(gathered.view(-1))

        u = self._floats("u", values, size)
        quantizer.decode(gathered, u)
        if quantizer.shifts_error:
            torch.sub(values[own], total.sub_(u[own]), out=sent[own])
        return u.view(-1)[:length], sent.view(-1)[:length]

    def state_dict(self) -> dict[str, Any]:
        return self._quantizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._quantizer.load_state_dict(state)

    def _rows(self, signal: Tensor, rows: int) -> Tensor:
        """Return the signal cut into rows, as it lies where they fit exactly, else copied and padded with zeros."""
        elements, _ = self._quantizer.row(-(-signal.numel() // rows))
        dtype = torch.promote_types(signal.dtype, torch.float32)
        if rows * elements == signal.numel() and dtype is signal.dtype:
            return signal.view(rows, elements)
        padded = self._workspace.take("values", (rows, elements), dtype, signal.device)
        padded.view(-1)[: signal.numel()].copy_(signal)
        padded.view(-1)[signal.numel() :].zero_()
        return padded

    def _floats(self, name: str, values: Tensor, rows: int) -> Tensor:
        return self._workspace.take(name, (rows, values.shape[1]), values.dtype, values.device)

    def _bytes(self, name: str, rows: int, length: int, device: torch.device) -> Tensor:
        return self._workspace.take(name, (rows, self._quantizer.row(length)[1]), torch.uint8, device)


def _add_up(rows: Tensor, out: Tensor) -> Tensor:
    """Write the sum of the rows to `out`, of shape (1, elements), in their order: the same bits wherever it is done."""
    total = out[0]
    if len(rows) == 1:
        total.copy_(rows[0])
    else:
        torch.add(rows[0], rows[1], out=total)
        for row in rows[2:]:
            total.add_(row)
    return out
