"""Local SGD, or k-step averaging: k local steps on every rank, then the average of the parameters.

McDonald et al. 2010; Zinkevich et al. 2010; Stich 2018 (arXiv 1805.09767); Lin et al. 2018 (arXiv 1808.07217).
Signal z - x; H = k; outer step SGD(1), which makes z the average; merge: replace. The inner optimizer's state stays
local, as in Lin et al., unless it is averaged or reset.

With a delay tau > 0 the all-reduce is overlapped with the next tau local steps, which are carried over to the average:
x <- x + x̄ - x_sent.

Post-local SGD (Lin et al. 2018, arXiv 1808.07217) is the same with H = 1 up to a switch (theirs: the first decrease of
the learning rate), then H = k. While H = 1 its course is that of synchronous SGD, also with momentum, which is linear
in the gradients (not Adam's; and with momentum only for equal shares).

Bytes per rank: an all-reduce of the parameters every H steps, 2(P-1)/P n / H a step with the ring. H = 1 cannot hide
it behind back-propagation, as synchronous SGD does.
"""

from torch import Tensor

from allreduce_sgd.strategies.method import Method

__all__ = ["Local", "PostLocal"]


class Local(Method):
    name = "local"
    consensus_kind = "the average of all ranks' models"
    averages = True

    def outer(self, anchor: Tensor, pull: Tensor, momentum: Tensor, lr: float) -> None:
        anchor.sub_(pull)


class PostLocal(Local):
    name = "post-local"
