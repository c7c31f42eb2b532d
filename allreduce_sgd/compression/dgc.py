"""Deep gradient compression: top-k with the momentum in front of the selection.

Lin et al., "Deep gradient compression: reducing the communication bandwidth for distributed training", ICLR 2018,
arXiv 1712.01887. With g the gradient, m the momentum, and the top-k elements of `unsent` sent:

    velocity = m velocity + g,    unsent = unsent + velocity

(momentum correction: momentum runs on also where nothing is sent); what is sent is taken out of `unsent`, and out of
`velocity` (momentum factor masking: a late gradient does not push on in a direction that may have turned). The warm-up
of the sparsity is in `density`. With m = 0 this is top-k with error feedback.

The momentum is in here, so the optimizer that gets u must have none.

Steps and bytes per rank: those of top-k, 8 k (P-1) for float32. Memory: four times the signal, and top-k's.

Differences from the paper: elements are chosen among all of a bucket instead of by layer; gradients are not clipped by
each rank before they are added, which the trainer's clipping of the sum replaces; momentum is not Nesterov's. A step
whose u is not finite leaves velocity and unsent as they were, on all ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import Codec, Exchange, is_finite, kept
from allreduce_sgd.compression.density import Density
from allreduce_sgd.compression.top_k import TopK

__all__ = ["DeepGradientCompression"]


class DeepGradientCompression(Codec):
    """Top-k with momentum correction. Keeps velocity, unsent, and the number of steps.

    Its own error feedback: must not be wrapped in another.
    """

    def __init__(self, density: Density, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, allowed are 0 and more, below 1")
        self._momentum = momentum
        self._top_k = TopK(density)
        self._velocity: Tensor | None = None
        self._unsent: Tensor | None = None
        # What the step under way makes of them is written here, and takes their place when it has succeeded.
        self._next: tuple[Tensor, Tensor] | None = None

    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        self._velocity = kept(self._velocity, signal, "velocity")
        self._unsent = kept(self._unsent, signal, "unsent gradient")
        if self._next is None:
            self._next = torch.empty_like(signal), torch.empty_like(signal)
        velocity = torch.add(signal, self._velocity, alpha=self._momentum, out=self._next[0])
        unsent = torch.add(self._unsent, velocity, out=self._next[1])
        u, sent = yield from self._top_k.reduce(unsent, comm)
        if is_finite(u):
            velocity.index_fill_(0, self._top_k.indices, 0)
            unsent.index_fill_(0, self._top_k.indices, 0)
            self._next = self._velocity, self._unsent
            self._velocity, self._unsent = velocity, unsent
        return u, sent

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self._velocity, "unsent": self._unsent, "top_k": self._top_k.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._velocity, self._unsent = (
            None if tensor is None else tensor.clone() for tensor in (state["velocity"], state["unsent"])
        )
        self._next = None
        self._top_k.load_state_dict(state["top_k"])

    def rescale_(self, factor: float) -> None:
        for tensor in (self._velocity, self._unsent):
            if tensor is not None:
                tensor.mul_(factor)
