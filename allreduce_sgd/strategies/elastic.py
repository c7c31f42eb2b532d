"""EASGD: every rank explores on its own, tied to a common centre as by a spring. Here synchronous, by all-reduce.

Zhang, Choromanska and LeCun, "Deep learning with elastic averaging SGD", NIPS 2015, arXiv 1412.6651. Every `period`
steps, besides the gradient step,

    x_i <- x_i - η g_i(x_i) - α (x_i - z),    z <- z + α Σ_i (x_i - z)

both with the old z, and with x_i before its gradient step; α = β/P, β = 0.9. Since α Σ (x_i - z) = β (x̄ - z), this is
an exchange like the others: outer step SGD(β), merge: elastic. All ranks count alike, whatever samples they have.

x_i is sent before the gradient step and needed after it, so that the all-reduce is overlapped with a whole step.

The consensus model is the centre z. A codec compresses x_i - z on its way to the centre; a rank's own pull is exact.
The difference is still there in the next exchange, so that error feedback, which would count again what was left out,
is refused.

Bytes per rank: an all-reduce of the parameters every `period` steps; the paper's server takes 2n per worker and
exchange. Memory: z and what was sent beside the model.
"""

import torch
from torch import Tensor, nn

from allreduce_sgd.gradients.buckets import Bucket
from allreduce_sgd.strategies.method import Method

__all__ = ["Elastic"]


class Elastic(Method):
    """`ranks` is P."""

    name = "easgd"
    consensus_kind = "the centre (equal on all ranks)"
    weighs_samples = False
    early = True
    consensus_is_anchor = True
    signal_persists = True

    def __init__(self, ranks: int, beta: float = 0.9) -> None:
        self.alpha = beta / ranks
        self.beta = beta

    def outer(self, anchor: Tensor, pull: Tensor, momentum: Tensor, lr: float) -> None:
        anchor.sub_(pull, alpha=self.beta)

    def arrive(
        self,
        parameters: tuple[nn.Parameter, ...],
        anchor: Bucket,
        pull: Tensor,
        momentum: Tensor,
        sent: Bucket | None,
        lr: float,
    ) -> None:
        assert sent is not None
        # Both move by the old distance, so the parameters go first.
        torch.sub(anchor.buffer, sent.buffer, out=sent.buffer)
        torch._foreach_add_(parameters, sent.slots, alpha=self.alpha)
        self.outer(anchor.buffer, pull, momentum, lr)
