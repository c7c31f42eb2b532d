"""Synchronous SGD: every step all ranks' gradients are averaged, and all take the same optimizer step.

Goyal et al. 2017, arXiv 1706.02677. Signal: the gradient; H = 1; no delay; exchange: all-reduce, overlapped with
back-propagation, or what a codec makes of it. Bytes per rank and step: those of an all-reduce of the gradients,
2(P-1)/P n with the ring.

The average is weighted by samples, so that the outcome is that of one rank with the whole mini-batch even where the
shares differ in size; a rank whose share is empty contributes zeros.

With a sharded optimizer (`sharded.py`) each rank updates its part of the parameters; the outcome is the same. Then
every element is computed on one rank and copied, so that there is no drift that `resync_every` would have to heal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import CodecFactory
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.buckets import Bucket
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.sharded import Groups, ShardedOptimizer
from allreduce_sgd.strategies.base import Share, Strategy, agree_on_buffers, restored, zero_loss
from allreduce_sgd.strategies.noise_scale import NoiseScale
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.resync import Resync

__all__ = ["Synchronous"]


class Synchronous(Strategy):
    """Averages gradients as `gradients` says. `shard`: the optimizer that `make_optimizer` makes is sharded.

    Every `resync_every` steps all ranks take over rank 0's parameters; every `noise_every` steps the gradient noise
    scale is measured.
    """

    name = "sync"
    steps_alike = True

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
        resync_every: int | None = None,
        noise_every: int | None = None,
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
        self._resync = None if resync_every is None or shard else Resync(model, comm, resync_every)
        self._noise_every = noise_every
        self._noise: NoiseScale | None = None
        self._steps = 0
        if noise_every is not None:
            self._noise = self._noise_scale(compression, gradients)

    def weight(self, share: Share) -> float:
        """Return what this rank's gradient is multiplied by before gradients are summed."""
        return share.weight

    def step(self, share: Share) -> None:
        if self._weigh_losses:
            self._loss_weight = share.weight * self.comm.size
        else:
            self.replica.set_gradient_weight(self.weight(share))
        self._steps += 1
        if self._noise is None or self._steps % (self._noise_every or 1) or share.global_samples % self.comm.size:
            self._apply(lambda: self._gradients(share), lambda: self._hessian(share))
        else:
            self._apply(lambda: self._measured_gradients(share))
        if self._resync is not None:
            self._resync.after_step()

    def message_bytes(self) -> list[int]:
        return self.replica.bucket_bytes()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with restored(self.model.buffers()), self._looking_back():
            agree_on_buffers(self.model, self.comm, self._buffers)
            yield

    def finish(self) -> None:
        if self._ahead is not None:
            self._ahead.look_back_()
        agree_on_buffers(self.model, self.comm, self._buffers)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "bucket_order": self.replica.bucket_order(),
            "codecs": self.replica.codec_state_dict(),
            "steps": self._steps,
            "resync": None if self._resync is None else self._resync.state_dict(),
            "noise": None if self._noise is None else self._noise.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.sharded is None:
            self.replica.set_bucket_order(state["bucket_order"])
        self.replica.load_codec_state_dict(state["codecs"])
        self._steps = state["steps"]
        if self._resync is not None and state["resync"] is not None:
            self._resync.load_state_dict(state["resync"])
        if self._noise is not None and state["noise"] is not None:
            self._noise.load_state_dict(state["noise"])

    def measures(self) -> dict[str, float]:
        return {} if self._noise is None else self._noise.take()

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        if self._noise is None:
            return {}
        self._noise.update(sums)
        return {
            "gradient_noise_scale": self._noise.value,
            "gradient_noise_trace": self._noise.trace,
            "gradient_square": self._noise.square,
        }

    def summary(self) -> dict[str, Any]:
        if self._noise is None:
            return {}
        scale = self._noise.value
        return {
            "noise_scale": scale,
            # Of all ranks together; there, steps and samples are each about twice what they would be at best.
            "recommended_batch_size": None if scale is None else max(1, round(scale)),
        }

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

    def _hessian(self, share: Share) -> Tensor:
        """Return the second derivatives of the mean loss over all ranks. All ranks must call."""
        return self.comm.all_reduce(self._own_hessian(share) * share.weight).wait()

    def _measured_gradients(self, share: Share) -> Tensor:
        """Compute the gradients, and take the norms of this rank's own and of the average into the noise scale."""
        assert self._noise is not None
        own: list[Tensor] = []

        def observe(bucket: Bucket) -> None:
            own.append(_square(bucket.slots))

        self.replica.watch_buckets(observe)
        try:
            loss = self._gradients(share)
        finally:
            self.replica.watch_buckets(None)
        if self.sharded is None:
            average = [one.grad for one in self.model.parameters() if one.grad is not None and not one.grad.is_sparse]
            mean_square_part = float(_square(average)) / self.comm.size
        else:
            mean_square_part = float(_square(self.sharded.gradients()))
        scale = 1.0 if self.scaling is None else self.scaling.scale
        own_square = float(torch.stack(own).sum()) / (share.weight * scale) ** 2
        self._noise.add(own_square, mean_square_part / scale**2, share.samples)
        return loss

    def _noise_scale(self, compression: CodecFactory | None, gradients: GradientOptions) -> NoiseScale:
        given = f"--noise-scale {self._noise_every}"
        if self.comm.size < 2:
            raise ConfigError(f"{given}: compares the gradients of ranks, and there is only one; leave it out")
        if compression is not None:
            raise ConfigError(f"{given}: needs exact sums of gradients; leave out --compression")
        if gradients.sync_batch_norm:
            raise ConfigError(
                f"{given}: needs gradients that do not depend on other ranks; leave out --sync-batch-norm"
            )
        if self._needs_closure:
            raise ConfigError(
                f"{given}: {type(self.optimizer).__name__} computes several gradients a step; leave it out"
            )
        return NoiseScale(self.comm.size)

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


def _square(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of all tensors together, in float64."""
    norms = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in tensors]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
