"""DiLoCo: many local steps, then a step of Nesterov's momentum along the average of their outcomes.

Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023, arXiv 2311.08105. Every H
steps (500) z - x̄ is the gradient of an outer SGD with learning rate 0.7 and Nesterov momentum 0.9, in torch's form:

    m <- μ m + (z - x̄),    z <- z - η ((z - x̄) + μ m),    x <- z

The paper's inner optimizer is AdamW (`--optimizer adamw`), its state kept.

Streaming (Douillard et al., "Streaming DiLoCo with overlapping communication", 2025, arXiv 2501.18512): the model is
cut into F fragments of about equal bytes, each exchanged every H steps and in turn every H/F, so that no exchange
carries more than 1/F of the bytes; and an exchange may be late by tau steps, when x <- (1 - a) z + a x (`mixing` a)
keeps some of what was learnt meanwhile. Fragment f (from 0) is exchanged first at step H (f + 1) / F: none goes longer
than H steps without, and for F = 1 it is H.

The consensus model is z, which is as old as the last exchange. Differences from the papers: fragments are sets of
parameters chosen for equal bytes, not layers; what is sent is not quantised unless a codec is given.

Bytes per rank: an all-reduce of the parameters every H steps, as local SGD. Memory: z and m beside the model, and with
tau > 0 what was sent.
"""

import torch
from torch import Tensor, nn

from allreduce_sgd.gradients.buckets import Bucket
from allreduce_sgd.strategies.method import Method

__all__ = ["DiLoCo"]


class DiLoCo(Method):
    """`outer_lr` is η, `momentum` is μ; `mixing` is a, the share of its own model a rank keeps if z comes late."""

    name = "diloco"
    consensus_kind = "the anchor of the last outer step (equal on all ranks)"
    keeps_momentum = True
    consensus_is_anchor = True

    def __init__(self, outer_lr: float = 0.7, momentum: float = 0.9, mixing: float = 0.5) -> None:
        self.outer_lr = outer_lr
        self.momentum = momentum
        self.mixing = mixing

    def outer(self, anchor: Tensor, pull: Tensor, momentum: Tensor, lr: float) -> None:
        momentum.mul_(self.momentum).add_(pull)
        anchor.sub_(pull, alpha=self.outer_lr).sub_(momentum, alpha=self.outer_lr * self.momentum)

    def merge(self, parameters: tuple[nn.Parameter, ...], anchor: Bucket, sent: Bucket | None) -> None:
        if sent is None:
            super().merge(parameters, anchor, sent)
        else:
            torch._foreach_lerp_(parameters, anchor.slots, 1 - self.mixing)
