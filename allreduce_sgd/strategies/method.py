"""One row of the table of anchored methods: what becomes of the anchor, and of each rank's model, in an exchange.

    z <- outer(z, z - x̄),    x <- merge(x, x_sent, z)

with x̄ the mean of all ranks' models as they were sent. When exchanges happen, how they travel and what they cost is
the business of `anchored.py`, the same for all.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from allreduce_sgd.gradients.buckets import Bucket

__all__ = ["Method"]


class Method(ABC):
    """The entries of one method, with its hyper-parameters. Keeps nothing else: the tensors are the caller's.

    Tensors are changed in place, under torch.no_grad.
    """

    name: str
    """As `--strategy` spells it."""
    consensus_kind: str
    """What the consensus model is, for the summary."""
    averages = False
    """Whether `outer` makes the anchor the mean and `merge` is the one below, so that no anchor need be kept."""
    keeps_momentum = False
    """Whether `outer` needs a tensor of its own for every anchor."""
    weighs_samples = True
    """Whether the mean weighs ranks by the samples they have seen since the last exchange; else all alike."""
    early = False
    """Whether x is sent as it was before the optimizer's step at whose end the exchange arrives."""
    consensus_is_anchor = False
    """Whether the consensus is the anchor; else the mean of all ranks' models."""
    signal_persists = False
    """Whether what a codec leaves out of z - x is there again in the next exchange."""

    @abstractmethod
    def outer(self, anchor: Tensor, pull: Tensor, momentum: Tensor, lr: float) -> None:
        """Move the flat anchor z, given `pull` = z - x̄ of the same shape, which may be overwritten.

        `momentum`: zeros at first, then what was left in it; empty unless `keeps_momentum`. `lr` is the inner
        optimizer's learning rate, of its first group. The same on all ranks, so that z stays equal.
        """

    def merge(self, parameters: tuple[nn.Parameter, ...], anchor: Bucket, sent: Bucket | None) -> None:
        """Move the parameters x, given the anchor z and x as it was sent, which may be overwritten; None: x is that.

        Replace, x <- z; where steps have been made meanwhile, carry: x <- x + z - x_sent.
        """
        if sent is None:
            torch._foreach_copy_(parameters, anchor.slots)
        else:
            torch.sub(anchor.buffer, sent.buffer, out=sent.buffer)
            torch._foreach_add_(parameters, sent.slots)

    def arrive(
        self,
        parameters: tuple[nn.Parameter, ...],
        anchor: Bucket,
        pull: Tensor,
        momentum: Tensor,
        sent: Bucket | None,
        lr: float,
    ) -> None:
        """Take over the outcome of an exchange: move the anchor, then the parameters."""
        self.outer(anchor.buffer, pull, momentum, lr)
        self.merge(parameters, anchor, sent)
