"""SlowMo: slow momentum on top of local SGD.

Wang, Tantia, Ballas and Rabbat, "SlowMo: improving communication-efficient distributed SGD with slow momentum", ICLR
2020, arXiv 1910.00643. Every H steps, with γ the learning rate, β the slow momentum and α the slow learning rate,

    u <- β u + (z - x̄) / γ,    z <- z - α γ u,    x <- z

so that u is in units of gradients, and keeps its meaning while γ changes. β = 0, α = 1 is local SGD.

γ is the rate of the step at whose end the exchange arrives. Where the optimizer has groups with different rates, it is
the first group's: only ratios of γ over time matter, and a schedule is the same factor for all groups. Where γ is 0
(a schedule's end) the average is taken over with α and without u, which only decays: the limit that makes sense.

The paper keeps, averages or resets the inner optimizer's state (its "buffer strategies"): `inner_state`. Difference
from the paper: exchanges may be late (carry, as in local SGD).

Bytes per rank: an all-reduce of the parameters every H steps, as local SGD. Memory: z and u beside the model.
"""

import torch
from torch import Tensor

from allreduce_sgd.strategies.method import Method

__all__ = ["SlowMo"]


class SlowMo(Method):
    """`outer_lr` is α, `momentum` is β."""

    name = "slowmo"
    consensus_kind = "the average of all ranks' models"
    keeps_momentum = True

    def __init__(self, outer_lr: float = 1.0, momentum: float = 0.6) -> None:
        self.outer_lr = outer_lr
        self.momentum = momentum
        self.averages = outer_lr == 1 and momentum == 0

    def outer(self, anchor: Tensor, pull: Tensor, momentum: Tensor, lr: float) -> None:
        if lr > torch.finfo(anchor.dtype).tiny:
            momentum.mul_(self.momentum).add_(pull, alpha=1 / lr)
            anchor.sub_(momentum, alpha=self.outer_lr * lr)
        else:
            momentum.mul_(self.momentum)
            anchor.sub_(pull, alpha=self.outer_lr)
