"""Asynchronous EASGD: workers step alone, each pulled to a centre that servers keep, and the centre to them.

Zhang, Choromanska and LeCun, "Deep learning with elastic averaging SGD", NIPS 2015, arXiv 1412.6651, algorithm 1. After
every `period` steps of its own worker i sends its parameters x; the server moves the centre z by d = alpha (x - z) and
answers d; the worker then moves by -d beside its gradient step, whose gradient was computed at x. The sum of centre and
worker stays the same. alpha = beta / workers. (All ranks at once, by all-reduce: `strategies/elastic.py`.)

Bytes per worker and step, n those of the parameters: 2 n / period. The messages travel while the gradient is computed.

Difference from the paper: none but the name of the moving rate; the centre never has momentum, the workers' optimizers
are what --optimizer says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.strategies.base import Share, zero_loss
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.server.loop import Server
from allreduce_sgd.strategies.server.messages import Expected, Kind, Message
from allreduce_sgd.strategies.server.roles import Role
from allreduce_sgd.strategies.server.worker import Served

__all__ = ["Centre", "ElasticWorker"]


class Centre(Server):
    """Keeps `values`, its part of the centre. `version` counts exchanges. Memory: a shard per worker beside it."""

    def __init__(self, role: Role, values: Sequence[Tensor], alpha: float) -> None:
        super().__init__(role, values)
        self._alpha = alpha
        # One per worker: it receives its answer while it computes, which may take a while.
        self._arrivals = {client: [torch.empty_like(value) for value in self.values] for client in role.clients}
        self._handlers[Kind.MIX] = self._mix

    def _mix(self, message: Message) -> None:
        arrival = self._arrivals[message.source]
        self.post.flush(message.source)
        self.post.take(message.source, arrival)
        self.wait_for_readers()
        torch._foreach_sub_(arrival, self.values)
        torch._foreach_mul_(arrival, self._alpha)
        torch._foreach_add_(self.values, arrival)
        self.version += 1
        self.post.send(message.source, Kind.ANSWER, (self.version,), arrival)


class ElasticWorker(Served):
    """Steps alone by `optimizer`, and meets the centre every `period` steps."""

    signal = "parameters"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        role: Role,
        clip_norm: float | None,
        period: int,
        gradients: GradientOptions,
        scaling: LossScaling | None = None,
    ) -> None:
        super().__init__(
            "easgd",
            model,
            optimizer,
            role,
            clip_norm,
            gradients,
            CompressionOptions(),
            seed=0,
            scaling=scaling,
            asynchronous=True,
        )
        self.consensus_kind = f"the servers' centre; {self.consensus_kind.partition('; ')[2]}"
        self._period = period
        self._steps = 0

    def step(self, share: Share) -> None:
        self._begin()
        answers: list[Expected] = []
        if self._steps == self._period:
            self._steps = 0
            self._gather(self.model.parameters())
            answers = self._line.start_mix([bucket.buffer for bucket in self._outgoing])
        self._steps += 1
        if share.losses:
            self._apply(lambda: self._gradients(share, answers))
        else:
            self._gradients(share, answers)

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]

    def _gradients(self, share: Share, answers: Sequence[Expected]) -> Tensor:
        loss = self._back_propagate(share) if share.losses else zero_loss(self.model)
        if answers:
            for answer in answers:
                answer.wait()
            with torch.no_grad():
                for bucket in self._line.incoming:
                    for parameter, move in zip(bucket.parameters, bucket.slots, strict=True):
                        parameter.sub_(move.to(parameter.device))
        return loss
