"""The anchored exchange: ranks step alone, and every H steps agree on a new common anchor.

Rank i holds x_i, all hold the anchor z. Every H steps: u = sum over ranks of w_i (z - x_i), by all-reduce;
z <- Outer(z, u); x_i <- Merge(x_i, z). A method is a choice of H, Outer and Merge. The weights w_i are the shares of
the samples that the ranks have seen since the last exchange, so that unequal shares count rightly and H = 1 with plain
SGD equals synchronous SGD.

Bytes per rank: one all-reduce of the parameters every H steps, 2(P-1)/P n / H a step with the ring. A codec may
compress the signal w_i (z - x_i) instead; with error feedback what it leaves out is added to the next one. Consensus
models are exact averages all the same.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import CodecFactory, drive
from allreduce_sgd.errors import NonFiniteError
from allreduce_sgd.gradients.buckets import Bucket, build_buckets
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import broadcast_tensors, check_same_model
from allreduce_sgd.strategies.base import Share, Strategy, agree_on_buffers, restored, zero_loss
from allreduce_sgd.strategies.precision import LossScaling

__all__ = ["Anchored"]


class Anchored(Strategy):
    """Local steps with an exchange every `period` steps.

    Of `gradients` it takes the bucket size, whether every rank checks its own gradients for NaN and infinity, and what
    becomes of buffers at an exchange. `compression` makes the codec of a bucket's signal.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        period: int,
        gradients: GradientOptions,
        compression: CodecFactory | None = None,
        scaling: LossScaling | None = None,
    ) -> None:
        super().__init__(model, optimizer, comm, clip_norm, scaling)
        self.period = period
        self._check_finite = gradients.check_finite
        self._buffers = gradients.buffers
        if comm.size > 1:
            check_same_model(model, comm)
            broadcast_tensors([*model.parameters(), *model.buffers()], comm)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        limit_bytes = gradients.bucket_mb * 2**20
        self._signals = build_buckets(trained, comm, limit_bytes, limit_bytes)
        self._anchors = [Bucket(signal.parameters, torch.empty_like(signal.buffer)) for signal in self._signals]
        self._read(self._anchors)
        self._codecs = [] if compression is None else [compression(signal.slots) for signal in self._signals]
        self._steps = 0
        self._samples = 0
        self._global_samples = 0

    @property
    def in_agreement(self) -> bool:
        return self._steps == 0

    @abstractmethod
    def outer(self, anchor: Tensor, signal: Tensor) -> None:
        """Move the flat anchor z in place, given the weighted sum u of all ranks' z - x. Equal on all ranks."""

    def step(self, share: Share) -> None:
        if share.losses:
            self._apply(lambda: self._gradients(share))
        self._steps += 1
        self._samples += share.samples
        self._global_samples += share.global_samples
        # One rank alone is serial SGD, bit for bit: z - (z - x) would round.
        if self._steps == self.period and self.comm.size > 1:
            self._exchange()

    def message_bytes(self) -> list[int]:
        return [signal.buffer.nbytes for signal in self._signals] if self.comm.size > 1 else []

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with restored([*self.model.parameters(), *self.model.buffers()]):
            if self._steps > 0 and self.comm.size > 1:
                self._take_signals()
                self._sum_signals(compress=False)
                with torch.no_grad():
                    for anchor, signal in zip(self._anchors, self._signals, strict=True):
                        signal.buffer.neg_().add_(anchor.buffer)
                self._write(self._signals)
            agree_on_buffers(self.model, self.comm, self._buffers)
            yield

    def finish(self) -> None:
        if self._steps > 0 and self.comm.size > 1:
            self._exchange(compress=False)
        agree_on_buffers(self.model, self.comm, self._buffers)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "parameters": {name: value.detach() for name, value in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "anchors": [anchor.buffer for anchor in self._anchors],
            "since_exchange": [self._steps, self._samples, self._global_samples],
            "codecs": [codec.state_dict() for codec in self._codecs],
            "scaling": None if self.scaling is None else self.scaling.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state["parameters"][name])
            for anchor, saved in zip(self._anchors, state["anchors"], strict=True):
                anchor.buffer.copy_(saved)
        self._steps, self._samples, self._global_samples = state["since_exchange"]
        for codec, kept in zip(self._codecs, state["codecs"], strict=True):
            codec.load_state_dict(kept)
        if self.scaling is not None:
            self.scaling.load_state_dict(state["scaling"])

    def restart(self) -> None:
        self._read(self._anchors)

    def _gradients(self, share: Share) -> Tensor:
        loss = zero_loss(self.model)
        for compute in share.losses:
            part = compute(self.model)
            self._backward(part)
            loss += part.detach()
        if self._check_finite:
            self._check(loss)
        return loss

    def _check(self, loss: Tensor) -> None:
        """Raise NonFiniteError, on this rank alone, where its loss or one of its gradients holds NaN or infinity."""
        named = [(name, one.grad) for name, one in self.model.named_parameters() if one.grad is not None]
        if torch.isfinite(nn.utils.get_total_norm([gradient for _, gradient in named]) + loss):
            return
        # A norm may overflow where no element does.
        bad = [f"the gradient of {name}" for name, gradient in named if not torch.isfinite(gradient).all()]
        if not torch.isfinite(loss):
            bad.insert(0, "the loss")
        if bad:
            raise NonFiniteError(f"NaN or Inf in {', '.join(bad)} of rank {self.comm.rank}")

    def _exchange(self, compress: bool = True) -> None:
        self._take_signals()
        self._sum_signals(compress)
        with torch.no_grad():
            for anchor, signal in zip(self._anchors, self._signals, strict=True):
                self.outer(anchor.buffer, signal.buffer)
        self._write(self._anchors)
        if self._buffers != "leave":
            agree_on_buffers(self.model, self.comm, self._buffers)
        self._steps = self._samples = self._global_samples = 0

    def _take_signals(self) -> None:
        """Make every signal buffer this rank's weighted z - x."""
        weight = self._samples / self._global_samples
        with torch.no_grad():
            for anchor, signal in zip(self._anchors, self._signals, strict=True):
                for parameter, before, slot in zip(signal.parameters, anchor.slots, signal.slots, strict=True):
                    torch.sub(before, parameter, out=slot)
                signal.buffer.mul_(weight)

    def _sum_signals(self, compress: bool) -> None:
        """Make every signal buffer the sum of all ranks', or what the codecs let through of it."""
        if compress and self._codecs:
            with torch.no_grad():
                for codec, signal in zip(self._codecs, self._signals, strict=True):
                    signal.buffer.copy_(drive(codec.reduce(signal.buffer, self.comm))[0])
            return
        for work in [self.comm.all_reduce(signal.buffer) for signal in self._signals]:
            work.wait()

    def _read(self, buckets: list[Bucket]) -> None:
        with torch.no_grad():
            for bucket in buckets:
                for slot, parameter in zip(bucket.slots, bucket.parameters, strict=True):
                    slot.copy_(parameter)

    def _write(self, buckets: list[Bucket]) -> None:
        with torch.no_grad():
            for bucket in buckets:
                for slot, parameter in zip(bucket.slots, bucket.parameters, strict=True):
                    parameter.copy_(slot)
