"""The anchored exchange: ranks step alone, and every H steps agree on a new common anchor.

Rank i holds x_i, all hold the anchor z. Every H steps: u = sum over ranks of w_i (z - x_i), by all-reduce;
z <- Outer(z, u); x_i <- Merge(x_i, z). A method is a choice of H, Outer and Merge. The weights w_i are the shares of
the samples that the ranks have seen since the last exchange, so that unequal shares count rightly and H = 1 with plain
SGD equals synchronous SGD.

Bytes per rank: one all-reduce of the parameters every H steps, 2(P-1)/P n / H a step with the ring.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.buckets import Bucket, build_buckets
from allreduce_sgd.gradients.replicate import average_buffers, broadcast_tensors, check_same_model
from allreduce_sgd.strategies.base import Share, Strategy, restored, zero_loss

__all__ = ["Anchored"]


class Anchored(Strategy):
    """Local steps with an exchange every `period` steps; buckets of `bucket_mb` MiB are exchanged one after another."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        period: int,
        bucket_mb: float,
    ) -> None:
        super().__init__(model, optimizer, comm, clip_norm)
        self.period = period
        if comm.size > 1:
            check_same_model(model, comm)
            broadcast_tensors([*model.parameters(), *model.buffers()], comm)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        limit_bytes = bucket_mb * 2**20
        self._signals = build_buckets(trained, comm, limit_bytes, limit_bytes)
        self._anchors = [Bucket(signal.parameters, torch.empty_like(signal.buffer)) for signal in self._signals]
        self._read(self._anchors)
        self._steps = 0
        self._samples = 0
        self._global_samples = 0

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
                self._reduce_signals()
                with torch.no_grad():
                    for anchor, signal in zip(self._anchors, self._signals, strict=True):
                        signal.buffer.neg_().add_(anchor.buffer)
                self._write(self._signals)
            average_buffers(self.model, self.comm)
            yield

    def finish(self) -> None:
        if self._steps > 0 and self.comm.size > 1:
            self._exchange()
        average_buffers(self.model, self.comm)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "parameters": {name: value.detach() for name, value in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "anchors": [anchor.buffer for anchor in self._anchors],
            "since_exchange": [self._steps, self._samples, self._global_samples],
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

    def restart(self) -> None:
        self._read(self._anchors)

    def _gradients(self, share: Share) -> Tensor:
        loss = zero_loss(self.model)
        for compute in share.losses:
            part = compute(self.model)
            part.backward()
            loss += part.detach()
        return loss

    def _exchange(self) -> None:
        self._reduce_signals()
        with torch.no_grad():
            for anchor, signal in zip(self._anchors, self._signals, strict=True):
                self.outer(anchor.buffer, signal.buffer)
        self._write(self._anchors)
        self._steps = self._samples = self._global_samples = 0

    def _reduce_signals(self) -> None:
        """Make every signal buffer the weighted sum of all ranks' z - x."""
        weight = self._samples / self._global_samples
        works = []
        with torch.no_grad():
            for anchor, signal in zip(self._anchors, self._signals, strict=True):
                for parameter, before, slot in zip(signal.parameters, anchor.slots, signal.slots, strict=True):
                    torch.sub(before, parameter, out=slot)
                signal.buffer.mul_(weight)
                works.append(self.comm.all_reduce(signal.buffer))
        for work in works:
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
