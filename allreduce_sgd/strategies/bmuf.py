"""BMUF: blockwise model-update filtering, momentum on the movement of the average from block to block.

Chen and Huo, "Scalable training of deep learning machines by incremental block training with intra-block parallel
optimization and blockwise model-update filtering", ICASSP 2016. After every block of H local steps

    D <- μ D + ζ (x̄ - z),    z <- z + D,    x <- z

with block momentum μ = 1 - 1/P and block learning rate ζ = 1 by default. μ = 0, ζ = 1 is local SGD. This is the
paper's classical block momentum, not its Nesterov form.

Difference from the paper: exchanges may be late (carry, as in local SGD).

Bytes per rank: an all-reduce of the parameters every H steps, as local SGD. Memory: z and D beside the model.
"""

from torch import Tensor

from allreduce_sgd.strategies.method import Method

__all__ = ["Bmuf"]


class Bmuf(Method):
    """`ranks` is P; `outer_lr` is ζ, `momentum` is μ, None: 1 - 1/P."""

    name = "bmuf"
    consensus_kind = "the average of all ranks' models"
    keeps_momentum = True

    def __init__(self, ranks: int, outer_lr: float = 1.0, momentum: float | None = None) -> None:
        self.outer_lr = outer_lr
        self.momentum = 1 - 1 / ranks if momentum is None else momentum
        self.averages = outer_lr == 1 and self.momentum == 0

    def outer(self, anchor: Tensor, pull: Tensor, momentum: Tensor, lr: float) -> None:
        momentum.mul_(self.momentum).sub_(pull, alpha=self.outer_lr)
        anchor.add_(momentum)
