"""Against numerical drift: now and then all ranks take over the parameters of rank 0.

Ranks that apply the same sums take the same steps, so that their parameters stay equal bit for bit; where hardware or
libraries round differently on some ranks they drift apart, and nothing pulls them together again. Parameters only are
broadcast: optimizer state drifts as well, but is forgotten at the rate of its momentum.

Bytes per rank: one broadcast of the parameters every `every` steps, of which rank 0 sends the most, ceil(lg P) n.
"""

from typing import Any

from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.replicate import broadcast_tensors

__all__ = ["Resync"]


class Resync:
    """Broadcasts rank 0's parameters of `model` every `every` steps."""

    def __init__(self, model: nn.Module, comm: Communicator, every: int) -> None:
        self._model = model
        self._comm = comm
        self._every = every
        self._steps = 0

    def after_step(self) -> None:
        """Broadcast if the last time was `every` steps ago. All ranks must call, after every step."""
        self._steps += 1
        if self._steps == self._every:
            self._steps = 0
            if self._comm.size > 1:
                with self._comm.traffic.attributed("resync"):
                    broadcast_tensors(self._model.parameters(), self._comm)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
