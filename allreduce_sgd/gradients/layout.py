"""Where the gradients of a set of parameters lie: cut into buckets, with flags of which parameters were used."""

from collections.abc import Sequence

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.buckets import SPACING, Bucket, BucketMemory, Kind, assign, spaced
from allreduce_sgd.gradients.exchange import Exchange
from allreduce_sgd.gradients.members import Member

__all__ = ["Layout"]


class Layout:
    """The buckets of `members`; `messages[i]` is what is exchanged of bucket i.

    `flags` has an element for each member, and one that counts non-finite gradients. It rides at the end of the last
    message if the exchange can carry it, else it is memory of its own. `awaited[i]` counts the members of bucket i that
    are expected to get a gradient. Buckets are cut from `memory`. `sparse` are the identities of parameters whose
    gradients lie in no bucket.
    """

    def __init__(
        self,
        comm: Communicator,
        memory: BucketMemory,
        exchange: Exchange,
        first_bytes: float,
        bucket_bytes: float,
        reduce_dtype: torch.dtype | None,
        sparse: set[int],
    ) -> None:
        self.buckets: list[Bucket] = []
        self.messages: list[Tensor] = []
        self.awaited: list[int] = []
        self.flags = torch.zeros(0)
        self.flags_ride = False
        self._size = comm.size
        self._exchange = exchange
        self._limits = first_bytes, bucket_bytes
        self._reduce_dtype = reduce_dtype
        self._sparse = sparse
        self._memory = memory
        self._flag_memory = BucketMemory(comm)

    def cut(self, members: Sequence[Member], order: Sequence[int] | None) -> None:
        """Cut buckets for gradients that arrive in this order of places (None: in reverse). All ranks must call.

        Gradients that lie in the present buckets move out of them.
        """
        for member in members:
            member.parameter.grad = member.private_gradient()
        dense = [member for member in members if id(member.parameter) not in self._sparse]
        index_of = {member.place: index for index, member in enumerate(dense)}
        inner = None if order is None else [index_of[place] for place in order if place in index_of]
        parameters = [member.parameter for member in dense]
        groups = assign(parameters, *self._limits, inner, self._kind)
        self.flags_ride = self._exchange.rides_along and len(groups) > 0
        riders = [0] * len(groups)
        if self.flags_ride:
            riders[-1] = len(members) + 1
        pieces = []
        for group, extra in zip(groups, riders, strict=True):
            numel = sum(spaced(parameters[index].numel(), self._exchange.spacing) for index in group)
            pieces.append((self._kind(parameters[group[0]]), self._exchange.length(numel) + extra))
        # Room for other orders, and for an optimizer that is sharded later and so has its parameters spaced.
        spare = SPACING * (len(members) + len(groups) * self._size + 1)
        self.messages = self._memory.cut(pieces, spare)
        self.buckets = []
        for number, (group, message, extra) in enumerate(zip(groups, self.messages, riders, strict=True)):
            held = [parameters[index] for index in group]
            bucket = Bucket(held, message[: message.numel() - extra], self._exchange.spacing)
            self.buckets.append(bucket)
            for index, slot in zip(group, bucket.slots, strict=True):
                dense[index].bucket, dense[index].slot = number, slot
            message.zero_()
        if self.flags_ride:
            self.flags = self.messages[-1][-riders[-1] :]
        else:
            device = members[0].parameter.device if members else torch.device("cpu")
            (self.flags,) = self._flag_memory.cut([((torch.float32, device), len(members) + 1)])
        self._exchange.prepare(self.buckets)
        self.count_expected(members)

    def count_expected(self, members: Sequence[Member]) -> None:
        """Find anew how many members of each bucket get a gradient."""
        self.awaited = [0] * len(self.buckets)
        for member in members:
            if member.bucket is not None and member.expected > 0:
                self.awaited[member.bucket] += 1

    def raise_flags(self, missing: Sequence[Member], non_finite: int) -> None:
        """Say which members this rank had a gradient of: all but those that are missing and not used before."""
        self.flags.fill_(1)
        self.flags[-1] = non_finite
        for member in missing:
            if not member.used:
                self.flags[member.place] = 0

    def used_by(self) -> list[float]:
        """Return, after the flags have been summed, how many ranks had a gradient of each member."""
        counts: list[float] = self.flags[:-1].real.tolist()
        return counts

    def _kind(self, tensor: Tensor) -> Kind:
        wide = self._reduce_dtype
        if wide is not None and tensor.is_floating_point() and tensor.element_size() < wide.itemsize:
            return wide, tensor.device
        return tensor.dtype, tensor.device
