"""What the workers of all methods with parameter servers have in common.

A worker computes, and speaks to servers only. The first worker's parameters are the servers' first ones. For evaluation
and at the end all workers take the same version of the servers' parameters; buffers (batch statistics) stay with their
worker, and are made equal only then.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import broadcast_tensors
from allreduce_sgd.strategies.base import Share, Strategy, agree_on_buffers, restored, zero_loss
from allreduce_sgd.strategies.finite import check_finite
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.server.line import Line
from allreduce_sgd.strategies.server.roles import Role
from allreduce_sgd.strategies.server.shards import Vectors
from allreduce_sgd.strategies.server.tickets import ServedPace

__all__ = ["Served"]


class Served(Strategy):
    """What all workers have in common. `comm` is that of the workers; all of them construct it together.

    The first worker's parameters become the servers' with the first step or consensus, unless a state is loaded.
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
        seed: int,
        scaling: LossScaling | None,
        asynchronous: bool,
    ) -> None:
        super().__init__(model, optimizer, role.peers, clip_norm, scaling)
        self.name = name
        self.servers = role.servers
        self.replicated = not asynchronous
        self._vectors = Vectors(model, len(role.holders))
        self._line = Line(role, self._vectors, compression, seed)
        self.pace = ServedPace(self._line.post, role.holders[0], role.peers) if asynchronous else None
        # Where what is to be sent lies, until it has left.
        self._outgoing = self._vectors.memory()
        self._role = role
        self._buffers = gradients.buffers
        self._check_finite = gradients.check_finite
        buffers = "of rank 0" if self._buffers == "broadcast" else "averaged over workers"
        self.consensus_kind = f"the servers' parameters; buffers {buffers}"
        self._versions = [0 for _ in role.sources]
        self._begun = False
        self._finished = False
        self._told: tuple[list[int], list[int]] = ([], [])
        self._measured = (0.0, 0.0)
        broadcast_tensors(model.buffers(), self.comm)

    @property
    def everyone(self) -> Communicator:
        return self._role.world

    @property
    def in_agreement(self) -> bool:
        return self.pace is None

    def message_bytes(self) -> list[int]:
        """Return the size of each server's part of the parameters."""
        dtypes = self._vectors.dtypes
        return [
            sum((piece.stop - piece.start) * dtype.itemsize for piece, dtype in zip(pieces, dtypes, strict=True))
            for pieces in map(self._vectors.pieces, range(self._vectors.shards))
        ]

    @contextmanager
    def consensus(self) -> Iterator[None]:
        self._begin()
        with restored([*self.model.parameters(), *self.model.buffers()]):
            self._take_consensus()
            yield

    def finish(self) -> None:
        """Take the servers' parameters for good, and let the servers end; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._begin()
        self._take_consensus()
        if self.comm.rank == 0:
            self._told = self._line.tell()
        # A server may be gone as soon as its own workers are done.
        self.comm.barrier().wait()
        self._line.done()

    def measures(self) -> dict[str, float]:
        # The first worker knows of all gradients; sums over workers are its numbers.
        known = self._line.staleness if self.comm.rank == 0 else (0.0, 0.0)
        before, self._measured = self._measured, known
        return {"staleness": known[0] - before[0], "stale_gradients": known[1] - before[1]}

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        gradients = sums.get("stale_gradients")
        if self.pace is None or gradients is None:
            return {}
        return {"mean_staleness": sums["staleness"] / gradients if gradients else None}

    def summary(self) -> dict[str, Any]:
        """Return what servers and workers sent and received in training, in bytes, and the staleness of gradients."""
        server_bytes, histogram = all_gather_object(self.comm, self._told)[0]
        own = torch.tensor([self._line.post.training_bytes], dtype=torch.float64)
        worker_bytes = float(self.comm.all_reduce(own).wait()) / self.comm.size
        values: dict[str, Any] = {"server_bytes": server_bytes, "worker_bytes": round(worker_bytes)}
        gradients = sum(histogram)
        if gradients:
            values["staleness"] = {str(one): count for one, count in enumerate(histogram) if count}
            values["mean_staleness"] = sum(one * count for one, count in enumerate(histogram)) / gradients
        return values

    def before_checkpoint(self, step: int) -> None:
        """Have the servers call `save(step)`: after `state_dict`, just before this rank saves."""
        if self.comm.rank == 0:
            self._line.save(step)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "parameters": {name: value.detach() for name, value in self.model.named_parameters()},
            "versions": self._versions,
            "training_bytes": self._line.post.training_bytes,
            "staleness": list(self._line.staleness),
            "scaling": None if self.scaling is None else self.scaling.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state["parameters"][name])
        self._versions = list(state["versions"])
        self._line.post.training_bytes = state["training_bytes"]
        total, count = state["staleness"]
        self._line.staleness = self._measured = (total, count)
        if self.scaling is not None:
            self.scaling.load_state_dict(state["scaling"])
        self._begun = True

    def _begin(self) -> None:
        """Give the servers the first worker's parameters and take them from there, once, unless a state was loaded."""
        if self._begun:
            return
        self._begun = True
        if self.comm.rank == 0:
            self._gather(self.model.parameters())
            self._line.load([bucket.buffer for bucket in self._outgoing])
        self._fetch([0 for _ in self._versions], training=False)

    def _fetch(self, at_least: list[int], training: bool) -> None:
        """Replace the model's parameters by the servers', of at least these versions."""
        traffic = self._role.world.traffic
        # For evaluation they count as that.
        with traffic.attributed("parameters") if training else nullcontext():
            self._versions = self._line.fetch(at_least, training)
        self._install()

    @torch.no_grad()
    def _install(self) -> None:
        """Copy what has come into the model."""
        for bucket in self._line.incoming:
            parameters: list[Tensor] = list(bucket.parameters)
            torch._foreach_copy_(parameters, bucket.slots)

    @torch.no_grad()
    def _gather(self, values: Iterable[Tensor]) -> None:
        """Copy a tensor per parameter of the model into what is to be sent next, once that has left."""
        self._line.flush()
        by_parameter = {id(one): value for one, value in zip(self.model.parameters(), values, strict=True)}
        for bucket in self._outgoing:
            torch._foreach_copy_(bucket.slots, [by_parameter[id(one)] for one in bucket.parameters])

    def _back_propagate(self, share: Share, weigh_losses: bool = False) -> Tensor:
        """Fill `.grad` with the gradient of the share's mean loss; raise NonFiniteError where that is to be checked."""
        loss = zero_loss(self.model)
        for compute in share.losses:
            part = compute(self.model)
            self._backward(part * share.weight if weigh_losses else part)
            loss += part.detach()
        if self._check_finite:
            check_finite(self.model, loss, self.comm.rank)
        return loss

    def _take_consensus(self) -> None:
        versions = self._versions
        settled = torch.tensor(self._line.settle())
        # Nobody fetches before everybody's gradients are in, and nobody goes on before everybody has fetched.
        newest = self.comm.all_reduce(settled, ReduceOp.MAX).wait().tolist()
        self._fetch(newest, training=False)
        self._versions = versions
        agree_on_buffers(self.model, self.comm, self._buffers)
        self.comm.barrier().wait()
