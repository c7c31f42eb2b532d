"""Synchronous SGD: every step all ranks' gradients are averaged, and all take the same optimizer step.

Goyal et al. 2017, arXiv 1706.02677. Signal: the gradient; H = 1; no delay; exchange: all-reduce, overlapped with
back-propagation. Bytes per rank and step: those of an all-reduce of the gradients, 2(P-1)/P n with the ring.

The average is weighted by samples, so that the outcome is that of one rank with the whole mini-batch even where the
shares differ in size; a rank whose share is empty contributes zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import average_buffers
from allreduce_sgd.optim.build import needs_closure
from allreduce_sgd.strategies.base import Share, Strategy, restored, zero_loss

__all__ = ["Synchronous"]


class Synchronous(Strategy):
    name = "sync"
    consensus_kind = "every rank's model (equal on all); buffers averaged"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        gradients: GradientOptions,
    ) -> None:
        super().__init__(model, optimizer, comm, clip_norm)
        self.replica = DistributedDataParallel(
            model,
            comm,
            bucket_mb=gradients.bucket_mb,
            first_bucket_mb=gradients.first_bucket_mb,
            broadcast_buffers=False,
        )

    def step(self, share: Share) -> None:
        self.replica.set_gradient_weight(share.weight)
        self._apply(lambda: self._gradients(share))

    def message_bytes(self) -> list[int]:
        return self.replica.bucket_bytes()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with restored(self.model.buffers()):
            average_buffers(self.model, self.comm)
            yield

    def finish(self) -> None:
        average_buffers(self.model, self.comm)

    def _gradients(self, share: Share) -> Tensor:
        loss = zero_loss(self.model)
        for compute in share.losses[:-1]:
            with self.replica.no_sync():
                part = compute(self.replica)
                part.backward()
            loss += part.detach()
        if share.losses:
            part = share.losses[-1](self.replica)
            part.backward()
            loss += part.detach()
        else:
            self.replica.reduce_without_backward()
        if needs_closure(self.optimizer):
            # Line searches decide by the loss: it must be the same number on all ranks.
            loss = self.comm.all_reduce(loss * share.weight).wait()
        return loss
