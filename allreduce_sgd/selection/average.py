"""The running average of a model's parameters, shared out among ranks that have the same ones.

An update is x̄ ← x̄ + w (x − x̄) for every parameter that is trained. Where all ranks have the same parameters x, each
averages its part of the elements, 1/P of the work, and the parts are all-gathered when the average is asked for. Where
each rank has its own, it averages those, and the average over ranks is taken when it is asked for: averaging over time
and averaging over ranks may change places, both being linear.

Bytes per rank: those of an all-gather or all-reduce of the parameters when the average is asked for; none for updates.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.gradients.buckets import SPACING, Bucket, Kind, kind_of, spaced
from allreduce_sgd.schedules.step import chunk

__all__ = ["Average", "holding"]


class Average:
    """The average of what `model` was at each `update_`. All ranks must make it.

    `replicated`: all ranks have the same parameters whenever they update.
    """

    def __init__(self, model: nn.Module, comm: Communicator, replicated: bool) -> None:
        self.updates = 0
        self._comm = comm
        self._replicated = replicated
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        kinds: dict[Kind, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                kinds.setdefault(kind_of(parameter), []).append(parameter)
        self._buckets = [_bucket(members, kind, comm.size) for kind, members in kinds.items()]
        self._own: list[Tensor] = []
        self._sources: list[tuple[nn.Parameter, slice]] = []
        for bucket in self._buckets:
            self._cut(bucket)
        self._update(1.0)

    def update_(self, weight: float) -> None:
        """Move the average towards the present parameters by this weight; the first update makes it equal to them."""
        self._update(1.0 if self.updates == 0 else weight)
        self.updates += 1

    def gathered(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the average of every trained parameter, the same on all ranks; valid until this is called again.

        All ranks must call.
        """
        pairs: list[tuple[nn.Parameter, Tensor]] = []
        for bucket in self._buckets:
            whole = bucket
            if self._replicated:
                self._comm.all_gather(bucket.buffer).wait()
            else:
                whole = Bucket(bucket.parameters, bucket.buffer.clone(), SPACING)
                self._comm.all_reduce(whole.buffer, ReduceOp.AVERAGE).wait()
            pairs += zip(whole.parameters, whole.slots, strict=True)
        return pairs

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by the parameters' names, the same on all ranks. All ranks must call."""
        return {self._names[id(parameter)]: value.cpu().clone() for parameter, value in self.gathered()}

    def own_state_dict(self) -> dict[str, Tensor]:
        """Return what only this rank has: its own average, where ranks have parameters of their own."""
        if self._replicated:
            return {}
        pairs = [pair for one in self._buckets for pair in zip(one.parameters, one.slots, strict=True)]
        return {self._names[id(parameter)]: value.cpu().clone() for parameter, value in pairs}

    def load_state_dict(self, values: Mapping[str, Tensor], updates: int) -> None:
        """Go on from `own_state_dict`, or from `state_dict` where there is none."""
        with torch.no_grad():
            for bucket in self._buckets:
                for parameter, slot in zip(bucket.parameters, bucket.slots, strict=True):
                    slot.copy_(values[self._names[id(parameter)]])
        self.updates = updates

    def _cut(self, bucket: Bucket) -> None:
        """Settle which elements of the bucket's parameters this rank averages."""
        length, comm = bucket.buffer.numel(), self._comm
        mine = chunk(length, comm.size, comm.rank) if self._replicated else slice(0, length)
        for parameter, start in zip(bucket.parameters, bucket.starts, strict=True):
            first, last = max(start, mine.start), min(start + parameter.numel(), mine.stop)
            if first < last:
                self._own.append(bucket.buffer[first:last])
                self._sources.append((parameter, slice(first - start, last - start)))

    @torch.no_grad()
    def _update(self, weight: float) -> None:
        sources = [_in_order_of_memory(parameter)[part] for parameter, part in self._sources]
        if not sources:
            return
        if weight == 1.0:
            torch._foreach_copy_(self._own, sources)
        else:
            torch._foreach_lerp_(self._own, sources, weight)


@contextmanager
def holding(pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Have each parameter be the tensor beside it within the context, without a copy: ranks may share its memory."""
    pairs = list(pairs)
    kept = [(parameter, parameter.data) for parameter, _ in pairs]
    try:
        for parameter, value in pairs:
            parameter.data = value
        yield
    finally:
        for parameter, value in kept:
            parameter.data = value


def _bucket(members: list[nn.Parameter], kind: Kind, size: int) -> Bucket:
    # Spaced, so that kernels round every element alike, whoever averages it.
    length = sum(spaced(parameter.numel(), SPACING) for parameter in members)
    flat = torch.zeros(spaced(length, size * SPACING), dtype=kind[0], device=kind[1])
    return Bucket(members, flat, SPACING)


def _in_order_of_memory(parameter: nn.Parameter) -> Tensor:
    """Return the parameter's elements as a flat tensor, in the order in which its slot of a bucket has them."""
    data = parameter.detach()
    if data.is_contiguous():
        return data.view(-1)
    shaped = Bucket([parameter], torch.empty(data.numel(), dtype=data.dtype, device=data.device))
    shaped.slots[0].copy_(data)
    return shaped.buffer
