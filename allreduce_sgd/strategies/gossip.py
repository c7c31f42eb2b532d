"""Gossip: ranks on a ring average their parameters with neighbours only, and no message goes to all.

average    Lian et al., "Can decentralized algorithms outperform centralized algorithms?" (D-PSGD), NIPS 2017, arXiv
           1705.09056: x_i <- (x_left + x_i + x_right)/3 - eta g_i(x_i), with 1/2 each on two ranks.
push-sum   Assran et al., "Stochastic gradient push" (SGP), ICML 2019, arXiv 1811.10792, on the directed ring: each rank
           keeps half of its values x_i and of their weight w_i and sends the other halves to the right; gradients are
           taken at z_i = x_i / w_i, so that averages are right also where messages are late and weights uneven.

Signal: the parameters; H = 1; exchange: neighbours; merge: mix. What is sent are the parameters before this step's
gradient, so that messages travel while it is computed. Bytes per rank and step: 2n, on two ranks and for push-sum n.

The distance from the mean shrinks in every mixing by the second largest |eigenvalue| of the mixing matrix: on a ring of
P > 2, max |1 + 2 cos(2 pi k / P)| / 3 over k = 1..P-1, for push-sum cos(pi / P): 0, 0 and 1/3 on 2, 3 and 4 ranks, for
push-sum 0, 1/2 and 0.71, and nearly 1 on long rings.

With `delay` 1 neighbours' values are those they had a step before, so that messages have two gradients' time. For
`average` the mixing is then of present own and old others' values (before the first have come, own ones alone), and the
mean of all ranks is kept only as the ranks get near each other; for push-sum what is under way keeps its weight.

The consensus is the mean over all ranks, weighted by w_i, by an all-reduce. Each rank takes its own optimizer's step;
momentum stays local; one without samples only mixes. Differences from the papers: the model holds z, so that the
optimizer steps z, not x, by the learning rate (with even weights it is the same); SGP's graph changes from step to
step and its gradient comes before the mixing. `buffers` other than leave take a collective every step.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.compression.messages import Together, has_messages
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.buckets import Bucket, build_buckets
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import broadcast_tensors, check_same_model
from allreduce_sgd.strategies.base import Share, Strategy, agree_on_buffers, restored
from allreduce_sgd.strategies.precision import LossScaling

__all__ = ["Gossip"]

_TAG = 31251
_KINDS = ("average", "push-sum")


class Gossip(Strategy):
    """Mixes parameters with neighbours as `kind` says, "average" or "push-sum", `delay` 0 or 1 steps late."""

    name = "gossip"
    consensus_kind = "the average of all ranks' models"
    signal = "parameters"
    replicated = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        gradients: GradientOptions,
        kind: str = "average",
        delay: int = 0,
        scaling: LossScaling | None = None,
    ) -> None:
        super().__init__(model, optimizer, comm, clip_norm, scaling)
        if kind not in _KINDS:
            raise ConfigError(f"--gossip: {kind!r} is none of {', '.join(_KINDS)}")
        if delay not in (0, 1):
            raise ConfigError(f"--delay {delay}: --strategy gossip can be 0 or 1 steps late")
        if self._needs_closure:
            raise ConfigError(
                f"--optimizer {type(optimizer).__name__}: evaluates the loss several times a step, while --strategy "
                f"gossip mixes; take another"
            )
        if comm.size > 1:
            if not has_messages(comm):
                raise ConfigError(
                    f"--strategy gossip: back end {comm.backend} has no messages between two ranks; take mpi or gloo"
                )
            check_same_model(model, comm)
            broadcast_tensors([*model.parameters(), *model.buffers()], comm)
        self.delay = delay
        self._push = kind == "push-sum"
        self._options = gradients
        self._weight = 1.0
        left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        both = sorted({left, right} - {comm.rank})
        sources, targets = ([left], [right]) if self._push else (both, both)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        limit_bytes = gradients.bucket_mb * 2**20
        self._rounds: list[_Round] = []
        if comm.size > 1:
            self._rounds = [_Round(trained, comm, sources, targets, limit_bytes, self._push) for _ in range(delay + 1)]
        self._oldest = 0
        self._outstanding = 0
        self._arrived: _Round | None = None

    @property
    def in_agreement(self) -> bool:
        return self.comm.size == 1

    def step(self, share: Share) -> None:
        if self._options.buffers != "leave":
            agree_on_buffers(self.model, self.comm, self._options.buffers)
        self._send()
        self.optimizer.zero_grad(set_to_none=True)
        self._own_gradients(share, self._options.check_finite)
        self._mix()
        if share.losses:
            if self.clip_norm is not None:
                self._clip(self.clip_norm * (1.0 if self.scaling is None else self.scaling.scale))
            self._update()

    def message_bytes(self) -> list[int]:
        return [bucket.buffer.nbytes for bucket in self._rounds[0].outgoing] if self._rounds else []

    def measures(self) -> dict[str, float]:
        if not self._rounds:
            return {}
        square = 0.0 if self._arrived is None else self._arrived.distance_square()
        return {"neighbour_distance_square": square, "measured": float(self._arrived is not None)}

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        if not self._rounds:
            return {}
        # Root of the mean square over the ranks, as the parameters were when they were last sent.
        mean = sums["neighbour_distance_square"] / max(1.0, sums["measured"])
        return {"neighbour_distance": math.sqrt(mean)}

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with restored([*self.model.parameters(), *self.model.buffers()]):
            self._average()
            yield

    def finish(self) -> None:
        self._land()
        self._outstanding = 0
        self._average()
        self._weight = 1.0

    def state_dict(self) -> dict[str, Any]:
        self._land()
        return {
            **super().state_dict(),
            "parameters": {name: value.detach() for name, value in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "weight": self._weight,
            "outstanding": [each.state_dict() for each in self._in_order()],
            "scaling": None if self.scaling is None else self.scaling.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state["parameters"][name])
        self._weight = state["weight"]
        self._oldest, self._outstanding = 0, len(state["outstanding"])
        if self._outstanding > self.delay:
            raise ConfigError(f"--delay {self.delay}: the checkpoint was written with --delay {self._outstanding}")
        for each, saved in zip(self._in_order(), state["outstanding"], strict=True):
            each.load_state_dict(saved)
        if self.scaling is not None:
            self.scaling.load_state_dict(state["scaling"])

    @torch.no_grad()
    def _send(self) -> None:
        """Send the present parameters to the neighbours, and expect theirs."""
        if self._rounds:
            if self._push:
                self._weight /= 2
            newest = self._rounds[(self._oldest + self._outstanding) % len(self._rounds)]
            self._outstanding += 1
            newest.start(self._weight)

    @torch.no_grad()
    def _mix(self) -> None:
        """Make the parameters the weighted mean of this rank's and of what is due of its neighbours'."""
        if not self._rounds or self._outstanding <= self.delay:
            return
        arrived = self._rounds[self._oldest]
        self._oldest = (self._oldest + 1) % len(self._rounds)
        self._outstanding -= 1
        arrived.land()
        total = arrived.mix_into_parameters(self._weight)
        if self._push:
            self._weight = total
        self._arrived = arrived

    def _in_order(self) -> "list[_Round]":
        return [self._rounds[(self._oldest + index) % len(self._rounds)] for index in range(self._outstanding)]

    def _land(self) -> None:
        for each in self._in_order():
            each.land()

    @torch.no_grad()
    def _average(self) -> None:
        """Make the parameters the weighted mean of all ranks', and buffers agree."""
        if self._rounds:
            total = float(self.comm.all_reduce(torch.tensor([self._weight], dtype=torch.float64)).wait())
            for bucket in self._rounds[0].outgoing:
                flat = torch.cat([parameter.reshape(-1) for parameter in bucket.parameters]).mul_(self._weight)
                self.comm.all_reduce(flat).wait().div_(total)
                pieces = flat.split([parameter.numel() for parameter in bucket.parameters])
                for parameter, piece in zip(bucket.parameters, pieces, strict=True):
                    parameter.copy_(piece.view(parameter.shape))
        agree_on_buffers(self.model, self.comm, self._options.buffers)


class _Round:
    """What goes to and comes from the neighbours in one step: parameters times their weight, and the weight."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        comm: Communicator,
        sources: Sequence[int],
        targets: Sequence[int],
        limit_bytes: float,
        weighted: bool,
    ) -> None:
        self._comm = comm
        self._sources, self._targets = sources, targets
        self.outgoing = build_buckets(parameters, comm, limit_bytes, limit_bytes)
        self._incoming = [
            [Bucket(bucket.parameters, torch.empty_like(bucket.buffer)) for bucket in self.outgoing] for _ in sources
        ]
        # Apart, since the parameters' dtype may be too narrow to keep the sum of all weights.
        self._weight = torch.ones(1, dtype=torch.float64) if weighted else None
        self._weights = [torch.ones(1, dtype=torch.float64) for _ in sources]
        self._works: Together | None = None

    def start(self, weight: float) -> None:
        for bucket in self.outgoing:
            for slot, parameter in zip(bucket.slots, bucket.parameters, strict=True):
                torch.mul(parameter, weight, out=slot)
        outgoing = [bucket.buffer for bucket in self.outgoing]
        if self._weight is not None:
            outgoing.append(self._weight.fill_(weight))
        works: list[Work] = []
        for source, buckets, their_weight in zip(self._sources, self._incoming, self._weights, strict=True):
            expected = [bucket.buffer for bucket in buckets]
            if self._weight is not None:
                expected.append(their_weight)
            works += [self._comm.receive(buffer, source, _TAG) for buffer in expected]
        for target in self._targets:
            works += [self._comm.send(buffer, target, _TAG) for buffer in outgoing]
        self._works = Together(works, outgoing[0], self._comm.timeout_seconds)

    def land(self) -> None:
        if self._works is not None:
            self._works.wait()
            self._works = None

    def mix_into_parameters(self, weight: float) -> float:
        """Make the parameters the mean of themselves, of this weight, and of what came; return the total weight."""
        total = weight + sum(float(each) for each in self._weights)
        for index, bucket in enumerate(self.outgoing):
            for place, parameter in enumerate(bucket.parameters):
                parameter.mul_(weight)
                for buckets in self._incoming:
                    parameter.add_(buckets[index].slots[place])
                parameter.div_(total)
        return total

    def distance_square(self) -> float:
        """Return the squared distance between this rank's and the first source's parameters, as they were sent."""
        own = 1.0 if self._weight is None else float(self._weight)
        theirs = float(self._weights[0])
        square = 0.0
        for mine, other in zip(self.outgoing, self._incoming[0], strict=True):
            square += float(torch.sub(mine.buffer / own, other.buffer / theirs).double().square().sum())
        return square

    def state_dict(self) -> dict[str, Any]:
        return {
            "incoming": [[bucket.buffer for bucket in buckets] for buckets in self._incoming],
            "weights": self._weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for buckets, saved in zip(self._incoming, state["incoming"], strict=True):
            for bucket, values in zip(buckets, saved, strict=True):
                bucket.buffer.copy_(values)
        for weight, value in zip(self._weights, state["weights"], strict=True):
            weight.copy_(value)
