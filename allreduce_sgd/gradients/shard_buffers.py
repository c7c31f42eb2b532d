"""The buffers of a model over the shards of a mini-batch, such as the running statistics of batch normalisation.

Every shard starts from the buffers that stood at the beginning of the step. At its end floating-point ones become what
they were plus the mean over shards, weighed by their samples, of what each shard's forward pass changed, added up in
the order of a tree (`fixed_tree.py`), so that they do not depend on who computed which shard; what no shard changed
keeps its bits. Others, such as counters, become what the first shard made of them. So running statistics are averages
of the shards' own ones, as batch normalisation normalises within a shard.

Bytes per rank and step: those of the tree for the floating-point buffers, and a broadcast of the others.
"""

import torch
from torch import Tensor, nn

from allreduce_sgd.gradients.buckets import kind_of
from allreduce_sgd.gradients.fixed_tree import FixedTree, PartialSums
from allreduce_sgd.gradients.replicate import broadcast_tensors

__all__ = ["ShardBuffers"]


class ShardBuffers:
    """Follows the buffers of `model` over the shards of a step, the leaves of `tree`.

    In every step all ranks call `begin`, `take` after each of their shards, and `end`.
    """

    def __init__(self, model: nn.Module, tree: FixedTree) -> None:
        self._model = model
        self._comm = tree.comm
        averaged = [buffer for buffer in model.buffers() if _is_averaged(buffer)]
        self._kinds = list(dict.fromkeys(map(kind_of, averaged)))
        lengths = [sum(one.numel() for one in averaged if kind_of(one) == kind) for kind in self._kinds]
        first = [
            torch.zeros(length, dtype=kind[0], device=kind[1])
            for length, kind in zip(lengths, self._kinds, strict=True)
        ]
        self._sums = PartialSums(tree, first)
        self._totals = first
        self._before: list[Tensor] = []
        self._others: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Remember what the buffers are."""
        self._before = [buffer.clone() for buffer in self._model.buffers()]

    @torch.no_grad()
    def take(self, weight: float) -> None:
        """Take what the next shard, `weight` of the mini-batch, has made of the buffers, and put them back."""
        buffers = list(self._model.buffers())
        pairs = list(zip(buffers, self._before, strict=True))
        if self._sums.depth == 0:
            self._others = [buffer.clone() for buffer in buffers if not _is_averaged(buffer)]
        for vector, kind in zip(self._sums.leaf(), self._kinds, strict=True):
            changes = [_change(after, before) for after, before in pairs if kind_of(before) == kind]
            torch.mul(torch.cat(changes), weight, out=vector)
        self._sums.add()
        for buffer, before in pairs:
            buffer.copy_(before)

    @torch.no_grad()
    def end(self) -> None:
        """Make the buffers what all shards together make of them. All ranks must call."""
        self._sums.finish()
        buffers = list(self._model.buffers())
        for vector, kind in zip(self._totals, self._kinds, strict=True):
            members = [buffer for buffer in buffers if kind_of(buffer) == kind]
            for buffer, change in zip(members, vector.split([one.numel() for one in members]), strict=True):
                buffer.add_(change.view(buffer.shape))
        others = [buffer for buffer in buffers if not _is_averaged(buffer)]
        for buffer, value in zip(others, self._others, strict=True):
            buffer.copy_(value)
        broadcast_tensors(others, self._comm)


def _is_averaged(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _change(after: Tensor, before: Tensor) -> Tensor:
    """Return how far the buffer has moved, flat; zero where it has not, also where that is infinite."""
    return (after - before).masked_fill_(after == before, 0).flatten()
