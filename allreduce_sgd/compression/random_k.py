"""Random-k: elements chosen at random, the same on all ranks, so that indices need not be sent.

Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", NeurIPS 2018, arXiv 1809.07599. Without error feedback the
other elements are lost: a step moves a random share of the parameters, and its expected value is the gradient times
that share. With error feedback an element comes about 1/share steps late and as much larger, which a momentum of 0.9
multiplies once more, so that training may diverge: lower the optimizer's momentum or the learning rate.

Bytes per rank: an all-reduce of k + 1 elements, 2(P-1)/P (k+1) e for elements of e bytes; for narrow floats, what the
communicator sends for them. One phase.

The additional element says whether any rank has NaN or infinity among those that are not sent, in which case u is NaN.

Differences from the papers: one element out of each of k equal parts of the bucket, instead of k out of all. Every
element has the same probability, thus error feedback the same guarantee, and drawing takes k steps instead of n.
Values are not divided by their probability (which would make the sum unbiased: Wangni et al., NeurIPS 2018, arXiv
1710.09854), since the learning rate can do that, and has to make up for the larger variance.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import Codec, Exchange
from allreduce_sgd.compression.density import Density
from allreduce_sgd.compression.seeds import reseed
from allreduce_sgd.compression.workspace import Workspace

__all__ = ["RandomK"]


class RandomK(Codec):
    """Sends the share of the elements that `density` says. Keeps the number of steps.

    `seed` is the same on all ranks.
    """

    def __init__(self, density: Density, seed: tuple[int, ...]) -> None:
        self._density = density
        self._seed = seed
        self._step = 0
        self._generator = torch.Generator()
        self._starts = self._widths = torch.empty(0, dtype=torch.int64)
        self._cut = (0, 0)
        self._workspace = Workspace()

    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        k = self._density.count(self._step, signal.numel())
        if k == 0:
            return signal.clone(), signal
        indices = self._draw(k, signal.numel()).to(signal.device)
        self._step += 1
        selected = signal.index_select(0, indices)
        lowest, highest = torch.aminmax(signal)
        wire = self._workspace.take("wire", (k + 1,), signal.dtype, signal.device)
        wire[:k] = selected
        wire[k] = lowest * 0 + highest * 0
        work = comm.all_reduce(wire)
        # While it travels.
        sent = self._workspace.like("sent", signal).zero_()
        sent.scatter_(0, indices, selected)
        yield work

        # Zero, unless some rank had something that is not finite.
        u = self._workspace.like("u", signal).fill_(wire[k])
        u.scatter_(0, indices, wire[:k])
        return u, sent

    def state_dict(self) -> dict[str, Any]:
        return {"seed": list(self._seed), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seed = tuple(state["seed"])
        self._step = state["step"]

    def _draw(self, k: int, length: int) -> Tensor:
        """Return one index out of each of k parts."""
        if self._cut != (k, length):
            edges = torch.arange(k + 1) * length // k
            self._starts, self._widths, self._cut = edges[:-1], edges.diff(), (k, length)
        reseed(self._generator, *self._seed, self._step)
        places = torch.rand(k, dtype=torch.float64, generator=self._generator).mul_(self._widths)
        return places.long().add_(self._starts)
