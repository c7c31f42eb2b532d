"""No compression: an all-reduce in a codec's clothes, bit for bit what the communicator's own all-reduce gives.

It is what other codecs are tested and measured against; error feedback around it keeps a residual of exactly zero.

Steps and bytes per rank: those of the communicator's all-reduce. Work: one copy.
"""

from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import Codec, Exchange
from allreduce_sgd.compression.workspace import Workspace

__all__ = ["Identity"]


class Identity(Codec):
    """Sends the whole signal. Keeps nothing."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        u = self._workspace.like("u", signal).copy_(signal)
        yield comm.all_reduce(u)
        return u, signal
