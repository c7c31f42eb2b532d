"""Distributed mini-batches: samples that come while gradients are being summed are predicted, not learnt from.

Dekel, Gilad-Bachrach, Shamir and Xiao, "Optimal distributed online prediction using mini-batches", JMLR 2012, arXiv
1012.1367. Of every global mini-batch of b samples each rank computes the gradient of b/P; while the vector sum of the
gradients travels, further samples arrive (`Share.predictions`), which are served with the old parameters: their loss
counts, their gradients are never formed. Then all take the step. No gradient is stale.

Signal: the gradient; H = 1; no delay; outer step: the optimizer. Bytes per rank and step: those of an all-reduce of the
gradients, 2(P-1)/P n with the ring, hidden behind the predictions, not behind back-propagation.

What is learnt is what synchronous SGD learns from the samples that gradients are formed of. Predictions are made in
eval mode, so that batch-norm statistics and dropout's random numbers are as without them. Differences from the paper:
the update is any optimizer's, not only dual averaging.
"""

import torch

from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.late import Late

__all__ = ["DistributedMiniBatch"]


class DistributedMiniBatch(Late):
    """Synchronous SGD that runs `Share.predictions` while the sum of the gradients is in flight."""

    name = "dmb"
    consensus_kind = "every rank's model (equal on all)"

    @torch.no_grad()
    def meanwhile(self, share: Share) -> None:
        if not share.predictions:
            return
        # Not all modules need be in training mode: some have their statistics frozen.
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            for predict in share.predictions:
                predict(self.model)
        finally:
            for module in training:
                module.training = True
