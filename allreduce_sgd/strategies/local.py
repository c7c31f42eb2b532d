"""Local SGD, or k-step averaging: k local steps on every rank, then the average of the parameters.

McDonald et al. 2010; Zinkevich et al. 2010; Stich 2018 (arXiv 1805.09767); Lin et al. 2018 (arXiv 1808.07217).
Signal z - x; H = k; no delay; outer step SGD(1), which makes z the average; merge: replace. The optimizer's own state
(momentum) stays local, as in Lin et al.; buffers are averaged for the consensus model only.

Bytes per rank and step: an all-reduce of the parameters divided by k.
"""

from torch import Tensor

from allreduce_sgd.strategies.anchored import Anchored

__all__ = ["LocalSgd"]


class LocalSgd(Anchored):
    name = "local"
    consensus_kind = "the average of all ranks' models"

    def outer(self, anchor: Tensor, signal: Tensor) -> None:
        anchor.sub_(signal)
