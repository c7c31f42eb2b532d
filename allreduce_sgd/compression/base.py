"""What every codec offers: the sum over ranks of what each of them sends, which is less than its whole signal.

A codec owns its exchange, since one needs a gather, another two reductions after each other. The exchange is a
generator, so that the caller computes something else while messages are under way: it yields every time it has to
wait, and goes on when the caller has waited.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator, Work

__all__ = ["Codec", "CodecFactory", "Exchange", "drive", "is_finite", "kept"]

Exchange = Generator[Work, None, tuple[Tensor, Tensor]]
"""Yields a Work that has been started, and is advanced when that has been waited for; returns (u, sent)."""


class Codec(ABC):
    """Compresses the signals of one bucket, and may keep state for it.

    All ranks make the same codecs, and advance their exchanges in the same order. `rounds` counts the collectives that
    follow one another, later ones depending on the outcome of earlier ones (what is started together counts as one):
    exchanges of several rounds are advanced at points that are the same on all ranks.
    """

    rounds = 1

    @abstractmethod
    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        """Exchange `signal`, and return (u, sent). All ranks must call, with signals of one length and dtype.

        `signal` is flat, of a real floating-point dtype, contains this rank's weight already, is not changed, and must
        not change before the exchange has ended. `sent` is what this rank contributed, decoded; it may be the signal
        itself and is not to be written to. `u` is the sum over ranks of `sent`, the same bits on all ranks, and free
        to be overwritten. Both are flat, have the signal's length and dtype, and are valid until the next `reduce`.
        NaN or infinity in any rank's signal gives NaN or infinity in u.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank has to save so that a restored codec goes on bit for bit; tensors are not copied."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the codec stood whose `state_dict` this is; tensors are copied."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps nothing, this is another codec's state: {', '.join(state)}")

    def rescale_(self, factor: float) -> None:  # noqa: B027  # most codecs keep nothing in that unit
        """Multiply what is kept in the signal's unit by `factor`, as signals will be from now on (a new loss scale)."""


CodecFactory = Callable[[Sequence[Tensor]], Codec]
"""Makes the codec of one bucket from its slots: the parts of the signal in the parameters' shapes, in their order.

All ranks must call it for the same buckets in the same order.
"""


def drive(exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Take an exchange to its end, waiting for every Work, and return its (u, sent)."""
    try:
        while True:
            next(exchange).wait()
    except StopIteration as end:
        u, sent = end.value
        return u, sent


def is_finite(tensor: Tensor) -> bool:
    """Say whether no element is NaN or infinite, in one pass over the memory and without a copy."""
    if tensor.numel() == 0:
        return True
    # Both extremes are NaN if any element is.
    lowest, highest = torch.aminmax(tensor)
    return math.isfinite(lowest) and math.isfinite(highest)


def kept(state: Tensor | None, signal: Tensor, name: str) -> Tensor:
    """Return what a codec kept for a signal, on the signal's device: zeros where it has kept nothing yet.

    Raises ValueError, with the state's name, where it was kept for a signal of another length or dtype.
    """
    if state is None:
        return torch.zeros_like(signal)
    if state.shape != signal.shape or state.dtype is not signal.dtype:
        raise ValueError(
            f"the {name} has {state.numel()} elements of {state.dtype}, the signal {signal.numel()} of {signal.dtype}: "
            f"it was kept for another bucket"
        )
    return state.to(signal.device)
