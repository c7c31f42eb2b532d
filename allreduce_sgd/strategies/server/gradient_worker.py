"""The workers of the methods in which servers step: they compute gradients, push them, and fetch parameters.

- `server-sync`: every step each worker pushes its gradient, weighted by its share of the samples, and fetches what the
  servers made of all of them: synchronous SGD, in which the servers do what an all-reduce does elsewhere.
- `server-async`, Downpour SGD: Dean et al., "Large scale distributed deep networks", NIPS 2012. Each worker goes on
  with parameters that others have moved on meanwhile; it adds up its gradients over `push` steps and pushes the sum,
  and fetches every `fetch` steps. Where it does not fetch every step it applies its own gradients to its copy at once,
  by plain SGD, whatever the servers' optimizer.
- `server-staleness`: as the former, pushing and fetching every step; the servers divide by staleness (`rules.py`).

Bytes per worker and step, n those of the parameters: n / push sent and n / fetch received. Each push carries the
learning rate of its step, so servers know no schedule.

Differences from the papers: no Adagrad unless --optimizer says so; parameters without a gradient push zeros, so that
momentum and weight decay go on for them. What a worker has added up and not pushed when training ends is lost, as is
what servers hold of an unfinished group.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.server.roles import Role
from allreduce_sgd.strategies.server.worker import Served

__all__ = ["GradientWorker"]


class GradientWorker(Served):
    """Pushes gradients. `push` and `fetch` are in steps, and 1 for all methods but server-async.

    `weigh_losses`: batch statistics are those of all workers, so that weights must be applied before back-propagation.
    `optimizer` is never stepped: it holds the learning rate.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        role: Role,
        clip_norm: float | None,
        gradients: GradientOptions,
        compression: CompressionOptions,
        seed: int = 0,
        scaling: LossScaling | None = None,
        push: int = 1,
        fetch: int = 1,
    ) -> None:
        lockstep = name == "server-sync"
        super().__init__(
            name, model, optimizer, role, clip_norm, gradients, compression, seed, scaling, asynchronous=not lockstep
        )
        self._push_every = push
        self._fetch_every = fetch
        self._since_push = 0
        self._since_fetch = 0
        self._accrued = 0
        self._accrued_at = self._versions
        self._weigh_losses = gradients.sync_batch_norm and lockstep and self.comm.size > 1
        # Schedulers warn where an optimizer has not been stepped before them.
        optimizer._opt_called = True  # type: ignore[attr-defined]

    def step(self, share: Share) -> None:
        self._begin()
        finite = self._gradients(share)
        if self.pace is None:
            self._step_together(share, finite)
        else:
            self._step_alone(bool(share.losses) and finite)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "since": [self._since_push, self._since_fetch, self._accrued],
            "accrued": [bucket.buffer for bucket in self._outgoing] if self._accrued else [],
            "accrued_at": list(self._accrued_at),
            "line": self._line.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._since_push, self._since_fetch, self._accrued = state["since"]
        if self._accrued:
            for bucket, saved in zip(self._outgoing, state["accrued"], strict=True):
                bucket.buffer.copy_(saved)
        self._accrued_at = list(state["accrued_at"])
        self._line.load_state_dict(state["line"])

    @property
    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _step_together(self, share: Share, finite: bool) -> None:
        filled = bool(share.losses) and finite
        if filled:
            self._gather_gradients()
            if not self._weigh_losses and share.weight != 1.0:
                for bucket in self._outgoing:
                    bucket.buffer.mul_(share.weight)
        gradient = [bucket.buffer for bucket in self._outgoing] if filled else None
        self._line.push(gradient, self._lr, self._versions, finite)
        self._fetch([version + 1 for version in self._versions], training=True)

    def _step_alone(self, filled: bool) -> None:
        if filled:
            if self._accrued:
                self._add_gradients()
            else:
                self._gather_gradients()
                self._accrued_at = self._versions
            self._accrued += 1
            if self._fetch_every > 1:
                self._descend()
        self._since_push += 1
        self._since_fetch += 1
        if self._since_push == self._push_every:
            if self._accrued:
                self._line.push([bucket.buffer for bucket in self._outgoing], self._lr, self._accrued_at)
            self._since_push = self._accrued = 0
        if self._since_fetch == self._fetch_every:
            self._fetch([0 for _ in self._versions], training=True)
            self._since_fetch = 0

    def _gradients(self, share: Share) -> bool:
        """Fill `.grad`, unscaled and, where ranks step alone, clipped; say whether the gradients can be used."""
        self.optimizer.zero_grad(set_to_none=True)
        if not share.losses:
            return True
        self._back_propagate(share, self._weigh_losses)
        if self.scaling is not None:
            gate = _Gate(self.optimizer)
            # A scaler only looks at what it steps, and steps it if all gradients are finite.
            self.scaling.step(gate)  # type: ignore[arg-type]
            if not gate.open:
                return False
        if self.clip_norm is not None and self.pace is not None:
            self._clip(self.clip_norm)
        return True

    def _dense(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        if gradient is None:
            return torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        return gradient.to_dense() if gradient.is_sparse else gradient

    def _gather_gradients(self) -> None:
        self._gather(map(self._dense, self.model.parameters()))

    def _add_gradients(self) -> None:
        for bucket in self._outgoing:
            torch._foreach_add_(bucket.slots, [self._dense(one).to("cpu") for one in bucket.parameters])

    @torch.no_grad()
    def _descend(self) -> None:
        """Apply this worker's own gradient to its copy."""
        used: list[Tensor] = [one for one in self._vectors.parameters if one.grad is not None]
        torch._foreach_add_(used, [self._dense(one) for one in used], alpha=-self._lr)


class _Gate:
    """What a loss scaler steps in place of an optimizer; `open` once it did."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = optimizer.param_groups
        self.open = False

    def step(self) -> None:
        self.open = True
