"""Synchronous SGD: every step all ranks' gradients are averaged, and all take the same optimizer step.

Goyal et al. 2017, arXiv 1706.02677. Signal: the gradient; H = 1; no delay; exchange: all-reduce, overlapped with
back-propagation, or what a codec makes of it. Bytes per rank and step: those of an all-reduce of the gradients,
2(P-1)/P n with the ring.

The average is weighted by samples, so that the outcome is that of one rank with the whole mini-batch even where the
shares differ in size; a rank whose share is empty contributes zeros.

With a sharded optimizer (`sharded.py`) each rank updates its part of the parameters; the outcome is the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import CodecFactory
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.sharded import Groups, ShardedOptimizer
from allreduce_sgd.strategies.base import Share, Strategy, agree_on_buffers, restored, zero_loss
from allreduce_sgd.strategies.precision import LossScaling

__all__ = ["Synchronous"]


class Synchronous(Strategy):
    """Averages gradients as `gradients` says. `shard`: the optimizer that `make_optimizer` makes is sharded."""

    name = "sync"

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[Groups], torch.optim.Optimizer],
        comm: Communicator,
        clip_norm: float | None,
        gradients: GradientOptions,
        shard: bool = False,
        compression: CodecFactory | None = None,
        scaling: LossScaling | None = None,
    ) -> None:
        self.replica = DistributedDataParallel(
            model,
            comm,
            bucket_mb=gradients.bucket_mb,
            first_bucket_mb=gradients.first_bucket_mb,
            broadcast_buffers=gradients.buffers == "broadcast",
            average_buffers=gradients.buffers == "average",
            find_unused_parameters=gradients.find_unused_parameters,
            static_graph=gradients.static_graph,
            check_finite=gradients.check_finite,
            compression=compression,
        )
        self.sharded = ShardedOptimizer(self.replica, make_optimizer, share_parameters=True) if shard else None
        optimizer = self.sharded or make_optimizer([{"params": list(model.parameters())}])
        super().__init__(model, optimizer, comm, clip_norm, scaling)
        self._buffers = gradients.buffers
        buffers = "of rank 0" if self._buffers == "broadcast" else "averaged"
        self.consensus_kind = f"every rank's model (equal on all); buffers {buffers}"
        # Where batch statistics are those of all ranks, a gradient holds parts of other ranks' losses.
        self._weigh_losses = gradients.sync_batch_norm and comm.size > 1
        self._loss_weight = 1.0

    def step(self, share: Share) -> None:
        if self._weigh_losses:
            self._loss_weight = share.weight * self.comm.size
        else:
            self.replica.set_gradient_weight(share.weight)
        self._apply(lambda: self._gradients(share))

    def message_bytes(self) -> list[int]:
        return self.replica.bucket_bytes()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with restored(self.model.buffers()):
            self.finish()
            yield

    def finish(self) -> None:
        agree_on_buffers(self.model, self.comm, self._buffers)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "bucket_order": self.replica.bucket_order(),
            "codecs": self.replica.codec_state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.sharded is None:
            self.replica.set_bucket_order(state["bucket_order"])
        self.replica.load_codec_state_dict(state["codecs"])

    def _gradients(self, share: Share) -> Tensor:
        loss = zero_loss(self.model)
        for compute in share.losses[:-1]:
            with self.replica.no_sync():
                loss += self._back_propagate(compute)
        if share.losses:
            loss += self._back_propagate(share.losses[-1])
        else:
            self.replica.reduce_without_backward()
        if self._needs_closure:
            # Line searches decide by the loss: it must be the same number on all ranks.
            loss = self.comm.all_reduce(loss * share.weight).wait()
        return loss

    def _back_propagate(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        loss = compute(self.replica)
        self._backward(loss * self._loss_weight if self._weigh_losses else loss)
        return loss.detach()

    def _clip(self, max_norm: float) -> None:
        if self.sharded is None:
            self.replica.clip_grad_norm_(max_norm, untouched=True)
        else:
            self.sharded.clip_grad_norm_(max_norm)

    def _update(self) -> None:
        if self.scaling is None:
            self.optimizer.step()
            return
        if self.sharded is None:
            factor = self.scaling.step(self.optimizer)
        else:
            factor = self.scaling.step_sharded(self.sharded, self.comm)
        if factor != 1.0:
            self.replica.rescale_codecs(factor)
