"""Top-k: the elements of largest magnitude, with their indices.

Aji and Heafield, "Sparse communication for distributed gradient descent", EMNLP 2017, arXiv 1704.05021; with error
feedback it converges (Stich, Cordonnier and Jaggi, NeurIPS 2018, arXiv 1809.07599; Alistarh et al., NeurIPS 2018).

Ranks choose different elements, so that the selections are gathered: (P-1) k (4 + e) bytes per rank, e those of an
element and 4 those of an index (filled up to whole elements and indices); 8 k (P-1) for float32. That grows with P: an
all-reduce of n bytes of float32 sends 2(P-1)/P n, less from P = n/(4k) on. One phase.

Differences from the papers: elements are chosen among all of a bucket instead of by layer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import Codec, Exchange
from allreduce_sgd.compression.density import Density
from allreduce_sgd.compression.selection import largest
from allreduce_sgd.compression.workspace import Workspace

__all__ = ["TopK"]

_INDEX_BYTES = 4


class TopK(Codec):
    """Sends the share of the elements that `density` says. Keeps the number of steps.

    `indices` are those that were sent last. NaN counts as the largest magnitude of all.
    """

    def __init__(self, density: Density) -> None:
        self._density = density
        self._step = 0
        self._workspace = Workspace()
        self.indices = torch.empty(0, dtype=torch.int64)

    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        k = self._density.count(self._step, signal.numel())
        self._step += 1
        if k == 0:
            return signal.clone(), signal
        wide = torch.promote_types(signal.dtype, torch.float32)
        magnitudes = self._workspace.take("magnitudes", tuple(signal.shape), wide, signal.device)
        self.indices = largest(torch.abs(magnitudes.copy_(signal), out=magnitudes), k)
        selected = signal.index_select(0, self.indices)

        wire = self._wire(k, comm.size, signal)
        # The wider of the two first, so that both begin at whole elements.
        element_bytes = signal.element_size()
        values_start, indices_start = (0, k * element_bytes) if element_bytes >= _INDEX_BYTES else (k * _INDEX_BYTES, 0)
        values = wire[:, values_start:][:, : k * element_bytes].view(signal.dtype)
        indices = wire[:, indices_start:][:, : k * _INDEX_BYTES].view(torch.int32)
        values[comm.rank] = selected
        indices[comm.rank] = self.indices
        work = comm.all_gather(wire.view(-1))
        # While it travels.
        sent = self._workspace.like("sent", signal).zero_()
        sent.scatter_(0, self.indices, selected)
        yield work

        u = self._workspace.like("u", signal).zero_()
        # Rank by rank: within one no index comes twice, so that the order of summation is the same everywhere.
        for rank in range(comm.size):
            u.index_add_(0, indices[rank], values[rank])
        return u, sent

    def _wire(self, k: int, ranks: int, signal: Tensor) -> Tensor:
        """Return a row of bytes per rank, in whole words of the wider of element and index."""
        word_bytes = max(signal.element_size(), _INDEX_BYTES)
        row_bytes = -(-k * (signal.element_size() + _INDEX_BYTES) // word_bytes) * word_bytes
        return self._workspace.take("wire", (ranks, row_bytes), torch.uint8, signal.device)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
