"""Sums of gradients apart from back-propagation: in flight while something else is computed, used later.

There is a set of buckets for every sum that may be outstanding: that much memory, and one copy of a gradient, as in
back-propagation with overlap. A parameter that no rank had a gradient of in a step is left alone by that step: a flag
for each parameter rides at the end of the last bucket (`gradients/layout.py`). Sums of a codec follow one another,
since what one leaves out goes into the next: its exchange ends before the next one starts, so that it overlaps with one
gradient, not with several.

Differences from DistributedDataParallel: which parameters are trained is settled at the beginning, sparse gradients
travel as dense ones, and `static_graph` has no meaning.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.compression.base import CodecFactory
from allreduce_sgd.gradients.buckets import Bucket, BucketMemory
from allreduce_sgd.gradients.exchange import AllReduce, Compressed, Exchange, Flight
from allreduce_sgd.gradients.layout import Layout
from allreduce_sgd.gradients.members import Member, named_briefly, non_finite, report_non_finite
from allreduce_sgd.gradients.options import GradientOptions

__all__ = ["Sums"]


class Sums:
    """The sums over ranks of the gradients of the last steps, up to `delay` + 1 of them outstanding at once.

    All ranks must construct it, and call `launch` and `hand_out`, together.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        delay: int,
        options: GradientOptions,
        compression: CodecFactory | None = None,
    ) -> None:
        self.outstanding = 0
        self._exchange: Exchange = AllReduce(comm)
        if compression is not None and comm.size > 1:
            self._exchange = _OneSetOfCodecs(comm, compression)
        self._oldest = 0
        self._scale = 1.0
        named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        self._sums = [_Sum(named, comm, self._exchange, options) for _ in range(delay + 1)]

    @property
    def bucket_bytes(self) -> list[int]:
        return [bucket.buffer.nbytes for bucket in self._sums[0].buckets]

    @torch.no_grad()
    def launch(self, weight: float, scale: float = 1.0, all_expected: bool = False) -> None:
        """Start the sum of `weight` times what `.grad` holds, and leave `.grad` None.

        `scale` is what losses were multiplied by. With `all_expected` a parameter without a gradient on this rank
        raises RuntimeError with its name.
        """
        if self.outstanding == len(self._sums):
            raise RuntimeError("Sums: as many are outstanding as there are buckets for; hand_out() one first")
        if isinstance(self._exchange, Compressed):
            self.land()
            if scale != self._scale:
                # Not before: what the last exchange left out was in the unit of its own signal.
                for codec in self._exchange.codecs:
                    codec.rescale_(scale / self._scale)
        self._scale = scale
        newest = self._sums[(self._oldest + self.outstanding) % len(self._sums)]
        self.outstanding += 1
        newest.launch(weight, scale, all_expected)

    def land(self) -> None:
        """Wait for all that is under way."""
        for each in self._in_order():
            each.land()

    @torch.no_grad()
    def hand_out(self) -> tuple[float, list[Bucket]]:
        """Wait for the oldest sum, which is then outstanding no more, and make `.grad` of the parameters views of it.

        Returns the loss scale that it is in units of, and the buckets, which are valid until the next `launch`.
        """
        oldest = self._sums[self._oldest]
        oldest.land()
        oldest.hand_out()
        self._oldest = (self._oldest + 1) % len(self._sums)
        self.outstanding -= 1
        return oldest.scale, oldest.buckets

    def state_dict(self) -> dict[str, Any]:
        """Return all outstanding sums, once they have arrived, and what codecs keep; tensors are not copied."""
        self.land()
        codecs = self._exchange.codecs if isinstance(self._exchange, Compressed) else []
        return {
            "outstanding": [each.state_dict() for each in self._in_order()],
            "codecs": [codec.state_dict() for codec in codecs],
            "scale": self._scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.land()
        self._oldest = 0
        self.outstanding = len(state["outstanding"])
        for each, saved in zip(self._in_order(), state["outstanding"], strict=True):
            each.load_state_dict(saved)
        if isinstance(self._exchange, Compressed):
            for codec, saved in zip(self._exchange.codecs, state["codecs"], strict=True):
                codec.load_state_dict(saved)
        self._scale = state["scale"]

    def _in_order(self) -> "list[_Sum]":
        return [self._sums[(self._oldest + index) % len(self._sums)] for index in range(self.outstanding)]


class _OneSetOfCodecs(Compressed):
    """A codec belongs to a bucket of the model, in whichever set of buckets the present gradient lies."""

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        if not self.codecs:
            super().prepare(buckets)


class _Sum:
    """One set of buckets, and the exchange of what lies in them."""

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        comm: Communicator,
        exchange: Exchange,
        options: GradientOptions,
    ) -> None:
        self.scale = 1.0
        self._comm = comm
        self._exchange = exchange
        self._check_finite = options.check_finite
        self._members = [Member(name, parameter) for name, parameter in named]
        for place, member in enumerate(self._members):
            member.place = place
        limits = options.first_bucket_mb * 2**20, options.bucket_mb * 2**20
        self._layout = Layout(comm, BucketMemory(comm), exchange, *limits, None, set())
        with torch.no_grad():
            self._layout.cut(self._members, None)
        self._flights: list[Flight] = []
        self._flags: Work | None = None
        self._missing: list[Member] = []
        self._bad: list[str] = []

    @property
    def buckets(self) -> list[Bucket]:
        return self._layout.buckets

    def launch(self, weight: float, scale: float, all_expected: bool) -> None:
        self.scale = scale
        self._take(weight)
        if all_expected and self._missing:
            raise RuntimeError(
                f"rank {self._comm.rank}: parameters got no gradient in this step: {named_briefly(self._missing)}; use "
                f"them in the loss, freeze them with requires_grad_(False), or allow it with find_unused_parameters"
            )
        layout = self._layout
        self._bad = []
        if self._check_finite:
            for bucket in layout.buckets:
                self._bad += non_finite(bucket, self._members)
        layout.raise_flags(self._missing, len(self._bad))
        for index, (bucket, message) in enumerate(zip(layout.buckets, layout.messages, strict=True)):
            if self._exchange.rounds > 1:
                for flight in self._flights:
                    flight.advance()
            self._flights.append(Flight(self._exchange.start(index, bucket, message)))
        if not layout.flags_ride:
            self._flags = self._comm.all_reduce(layout.flags)

    def land(self) -> None:
        if not self._flights:
            return
        for flight in self._flights:
            flight.land()
        self._flights = []
        if self._flags is not None:
            self._flags.wait()
            self._flags = None
        if self._check_finite and self._layout.flags[-1].real > 0:
            report_non_finite(self._bad, self._comm)

    def hand_out(self) -> None:
        used = self._layout.used_by() if self._missing else None
        for member in self._members:
            member.parameter.grad = member.slot if used is None or used[member.place] > 0 else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "messages": self._layout.messages,
            "flags": self._layout.flags,
            "missing": [member.place for member in self._missing],
            "scale": self.scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for message, saved in zip(self._layout.messages, state["messages"], strict=True):
            message.copy_(saved)
        self._layout.flags.copy_(state["flags"])
        self._missing = [self._members[place] for place in state["missing"]]
        self.scale = state["scale"]

    def _take(self, weight: float) -> None:
        """Move the weighted gradients into the buckets, zeros where there is none."""
        self._missing = []
        for member in self._members:
            gradient, slot = member.parameter.grad, member.slot
            assert slot is not None
            if gradient is None:
                self._missing.append(member)
                slot.zero_()
                continue
            torch.mul(gradient.to_dense() if gradient.is_sparse else gradient, weight, out=slot)
            member.parameter.grad = None
