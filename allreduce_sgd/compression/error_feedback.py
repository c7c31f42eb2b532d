"""Error feedback: what a codec left out of this step's gradient is added to the next one.

Seide et al., "1-bit stochastic gradient descent and its application to data-parallel distributed training of speech
DNNs", Interspeech 2014; Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes",
ICML 2019, arXiv 1901.09847.

    carried = signal + residual,    (u, sent) = codec(carried),    residual = carried − sent

so that sent + residual equals the gradient plus the old residual: bit for bit (as values) where the codec rounds to a
narrower float or selects elements, to one unit in the last place of the largest of the terms otherwise.

Steps and bytes per rank: those of the codec. Work: an addition, a subtraction and a scan for NaN and infinity; memory:
twice the signal.

Differences from the papers: the residual is one of gradients, not of updates (gradients times learning rate), so a
learning rate that is cut lets what is kept count less. A step whose u is not finite leaves the residual as it was, on
all ranks, since nothing of such a step can be used: a gradient scaler skips it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import Codec, Exchange, is_finite, kept
from allreduce_sgd.compression.workspace import Workspace

__all__ = ["ErrorFeedback"]


class ErrorFeedback(Codec):
    """Error feedback around any codec. Keeps the residual, in the signal's dtype, and the codec's own state.

    A codec whose `sent` is exactly its signal keeps a residual of zero.
    """

    def __init__(self, codec: Codec) -> None:
        self.rounds = codec.rounds
        self._codec = codec
        self._residual: Tensor | None = None
        self._workspace = Workspace()

    @property
    def residual(self) -> Tensor | None:
        """What has not been sent yet, flat; None before the first step."""
        return self._residual

    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        self._residual = kept(self._residual, signal, "residual")
        carried = torch.add(signal, self._residual, out=self._workspace.like("carried", signal))
        u, sent = yield from self._codec.reduce(carried, comm)
        if is_finite(u):
            torch.sub(carried, sent, out=self._residual)
        return u, sent

    def state_dict(self) -> dict[str, Any]:
        return {"residual": self._residual, "codec": self._codec.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        residual = state["residual"]
        self._residual = None if residual is None else residual.clone()
        self._codec.load_state_dict(state["codec"])

    def rescale_(self, factor: float) -> None:
        if self._residual is not None:
            self._residual.mul_(factor)
        self._codec.rescale_(factor)
