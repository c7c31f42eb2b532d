"""Which part of every bucket a rank updates, and how the updated parameters reach the others.

The parameters move into flat buckets laid out like those of the gradients. A shard is this rank's part of one
parameter: with `whole` parameters all or nothing, else what lies in this rank's chunk of the bucket.

The flat parameters are one piece of memory for all ranks of a node (`shared`), where updating a shard is all there is
to do, or every rank's own, and the shards are all-gathered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.buckets import SPACING, Bucket, BucketMemory, kind_of, spaced
from allreduce_sgd.gradients.exchange import Exchange, Rounds
from allreduce_sgd.schedules.step import chunk

__all__ = ["ReduceScatter", "Shard", "ShardedParameters"]


class ReduceScatter(Exchange):
    """The sum over ranks of this rank's chunk of every bucket; the rest of the bucket is undefined afterwards."""

    whole = False
    stateful = True
    spacing = SPACING

    def length(self, numel: int) -> int:
        return spaced(numel, self.comm.size * SPACING)

    def start(self, index: int, bucket: Bucket, message: Tensor) -> Rounds:
        yield self.comm.reduce_scatter(message)


@dataclass(frozen=True)
class Shard:
    """Elements `start:stop` of a parameter in the order of its memory; `part` views them in the parameters' bucket, and
    `gradient` in that of the gradients."""

    parameter: nn.Parameter
    bucket: int
    start: int
    stop: int
    part: nn.Parameter
    gradient: Tensor


class ShardedParameters:
    """Moves the parameters of the buckets into flat memory, and cuts this rank's shards. All ranks must make it."""

    def __init__(self, buckets: Sequence[Bucket], comm: Communicator, whole: bool, shared: bool) -> None:
        self._comm = comm
        self._whole = whole
        self.gradients = buckets
        self.buckets: list[Bucket] = []
        self.shards: list[Shard] = []
        self._runs: list[list[slice]] = []
        self.shared = shared and comm.size > 1
        private = BucketMemory(comm)
        lengths = [(kind_of(bucket.parameters[0]), _length(bucket.parameters, comm.size)) for bucket in buckets]
        flats: list[Tensor] = []
        for kind, numel in lengths:
            flat = comm.allocate_shared(numel, *kind) if self.shared else None
            if flat is None:
                self.shared = False
                break
            flats.append(flat)
        if not self.shared:
            flats = private.cut(lengths)
        with torch.no_grad():
            for index, (gradients, flat) in enumerate(zip(buckets, flats, strict=True)):
                self._move(index, gradients, flat)
        comm.barrier().wait()

    def publish(self) -> None:
        """Make all ranks see the shards that each has updated. All ranks must call."""
        if self.shared:
            self._comm.barrier().wait()
            return
        works = []
        for bucket, runs in zip(self.buckets, self._runs, strict=True):
            if self._whole:
                works += [self._comm.broadcast(bucket.buffer[run], root) for root, run in enumerate(runs)]
            else:
                works.append(self._comm.all_gather(bucket.buffer))
        for work in works:
            work.wait()

    def gather(self, index: int, flat: Tensor) -> Tensor:
        """Fill a flat tensor laid out like bucket `index` with all ranks' shards. All ranks must call."""
        if not self._whole:
            return self._comm.all_gather(flat).wait()
        for root, run in enumerate(self._runs[index]):
            self._comm.broadcast(flat[run], root).wait()
        return flat

    def _move(self, index: int, gradients: Bucket, flat: Tensor) -> None:
        bucket = Bucket(gradients.parameters, flat, SPACING)
        self.buckets.append(bucket)
        self._runs.append(self._cut(bucket))
        mine = self._runs[-1][self._comm.rank]
        for which, (parameter, slot) in enumerate(zip(bucket.parameters, bucket.slots, strict=True)):
            slot.copy_(parameter)
            parameter.data = slot
            begin = bucket.starts[which]
            first, last = max(begin, mine.start), min(begin + parameter.numel(), mine.stop)
            if first < last:
                start, stop = first - begin, last - begin
                part = flat[first:last]
                gradient = gradients.buffer[gradients.starts[which] + start : gradients.starts[which] + stop]
                if self._whole or parameter.dim() == 0:
                    part, gradient = slot, gradients.slots[which]
                self.shards.append(Shard(parameter, index, start, stop, nn.Parameter(part), gradient))

    def _cut(self, bucket: Bucket) -> list[slice]:
        """Return the part of the bucket that each rank updates."""
        size = self._comm.size
        if not self._whole:
            return [chunk(bucket.buffer.numel(), size, rank) for rank in range(size)]
        # Each parameter goes to the rank in whose equal share its middle lies.
        numels = [spaced(parameter.numel(), SPACING) for parameter in bucket.parameters]
        ends = [0] * size
        position = 0
        total = sum(numels)
        for numel in numels:
            owner = min(size - 1, int((position + numel / 2) * size / max(1, total)))
            position += numel
            ends[owner] = position
        for rank in range(1, size):
            ends[rank] = max(ends[rank], ends[rank - 1])
        return [slice(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


def _length(parameters: Sequence[nn.Parameter], size: int) -> int:
    return spaced(sum(spaced(parameter.numel(), SPACING) for parameter in parameters), size * SPACING)
