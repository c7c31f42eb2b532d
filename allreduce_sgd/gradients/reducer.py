"""Overlap: buckets are all-reduced in index order while back-propagation is still computing the other gradients.

After Li et al., "PyTorch Distributed", VLDB 2020, arXiv 2006.15704. A hook runs when a parameter's gradient has been
accumulated: it copies the gradient, times its weight, into the bucket. A bucket whose gradients are all there is
launched once the buckets before it have been: every rank launches the same sequence, whatever order its own gradients
arrive in. At the end of the backward pass, which a callback of autograd tells, whatever is missing is filled in, the
rest is launched, everything is awaited, and `.grad` of every parameter becomes a view of its bucket.

What is missing contributes what its `.grad` holds, else zeros. Whether any rank had a gradient is known from one flag
per parameter, summed with the last bucket, so that it costs no collective; only exchanges that cannot carry flags
(compression, hooks, sharding) take a small all-reduce for them.

Differences from PyTorch DDP: nothing needs to be traced from the outputs to find unused parameters; the end of the pass
is awaited by a callback queued at its beginning, not when the last bucket launches; buckets are sized the same in the
first pass as later, so the first step overlaps too; a static graph may be combined with local accumulation.

Copies of a gradient: one, into its bucket, because autograd makes gradients in private memory and offers no way to
hand it the place; the weight is folded into it. Bytes per rank and step: those of the exchange of every bucket.
"""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.errors import located
from allreduce_sgd.gradients.buckets import Bucket, BucketMemory
from allreduce_sgd.gradients.exchange import Exchange, Flight, Waitable
from allreduce_sgd.gradients.layout import Layout
from allreduce_sgd.gradients.members import Member, named_briefly, non_finite, report_non_finite, watch
from allreduce_sgd.gradients.sparse import gather_sparse

__all__ = ["Reducer"]


class Reducer:
    """Reduces the gradients of named parameters over all ranks. All ranks must construct it, and step it, together.

    While `enabled`, every backward pass ends with each parameter's `.grad` = sum over ranks of weight times gradient.
    `weight` is this rank's, 1/size at first, which gives the average. `sparse` holds the parameters whose gradients are
    sparse tensors. `reduce_dtype` is that of buckets for narrower gradients; None: the parameters' own.

    `passes` counts synchronised backward passes; `unused` has the identities of the parameters that no rank had a
    gradient of in the last one. `before_bucket` is called with every bucket before its reduction starts, when it holds
    this rank's weighted gradients, and `after_bucket` once it has been reduced.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        comm: Communicator,
        memory: BucketMemory,
        exchange: Exchange,
        first_bucket_bytes: float,
        bucket_bytes: float,
        find_unused: bool = True,
        static_graph: bool = False,
        check_finite: bool = False,
        reduce_dtype: torch.dtype | None = None,
        sparse: Sequence[Tensor] = (),
    ) -> None:
        self.enabled = True
        self.weight = 1.0 / comm.size
        self._usual_weight: float | None = None
        self.members: list[Member] = []
        self.passes = 0
        self.unused: set[int] = set()
        self.before_bucket: Callable[[Bucket], None] | None = None
        self.after_bucket: Callable[[Bucket], None] | None = None
        self.alive = weakref.ref(self)
        self._comm = comm
        self._exchange = exchange
        self._find_unused, self._static, self._check_finite = find_unused, static_graph, check_finite
        held = {id(parameter) for parameter in sparse}
        self._layout = Layout(comm, memory, exchange, first_bucket_bytes, bucket_bytes, reduce_dtype, held)
        self._order: list[int] | None = None
        self._next_order: list[int] | None = None
        self._arrivals: list[int] | None = None
        self._learnt = False
        self._waiting: list[int] = []
        self._flights: list[Flight] = []
        self._abandoned: list[Flight] = []
        self._open = self._nested = False
        self._task = -1
        self._missing: list[Member] = []
        self._bad: list[str] = []
        self._hooks: dict[int, weakref.finalize[..., Reducer]] = {}
        self.follow(parameters)

    @property
    def buckets(self) -> list[Bucket]:
        return self._layout.buckets

    @property
    def order(self) -> list[int] | None:
        """The order of parameters, by index, that buckets are filled in from the next pass on; None: in reverse."""
        return self._order if self._next_order is None else self._next_order

    def follow(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Reduce the gradients of these parameters from now on. All ranks must call, between two passes."""
        known = {id(member.parameter): member for member in self.members}
        members = [
            known.pop(id(parameter)) if id(parameter) in known else Member(name, parameter)
            for name, parameter in parameters
        ]
        for gone in known.values():
            gone.parameter.grad = gone.private_gradient()
            self._hooks.pop(id(gone.parameter))()
        for place, member in enumerate(members):
            member.place, member.expected = place, 1
            if id(member.parameter) not in self._hooks:
                # Weakly: hooks live as long as the parameters, and must not act for a wrapper that is gone.
                ending = watch(member.parameter, _acting(self.alive, member))
                self._hooks[id(member.parameter)] = weakref.finalize(self, ending)
        self.members = members
        self._learnt = False
        self._lay_out(None)
        # A codec keeps residuals of its bucket, and one bucket is in order already.
        self._arrivals = [] if len(self.buckets) > 1 and not self._exchange.stateful else None

    def set_order(self, order: Sequence[int] | None) -> None:
        """Fill the buckets in this order for good, None: in the present one. All ranks must call, with the same."""
        if order is not None:
            if sorted(order) != list(range(len(self.members))):
                raise ValueError(f"the order {list(order)} is none of the parameters 0 to {len(self.members) - 1}")
            self._lay_out(list(order))
        self._arrivals = self._next_order = None

    def weigh_next(self, weight: float) -> None:
        """Have the next pass that reduces, and no other, weigh this rank's gradient by `weight`."""
        if self._usual_weight is None:
            self._usual_weight = self.weight
        self.weight = weight

    def close(self) -> None:
        """Take the hooks away, and leave the gradients in private memory: nothing uses the buckets' any more."""
        self._abandon()
        while self._abandoned:
            self._abandoned.pop(0).land()
        for member in self.members:
            member.parameter.grad = member.private_gradient()
        for remove in self._hooks.values():
            remove()
        self._hooks.clear()

    def begin_pass(self) -> None:
        """Be told, from within a backward pass, that it starts; later calls within the same pass do nothing."""
        if not self.enabled or not self.members:
            return
        task = torch._C._current_graph_task_id()
        if self._open and task != self._task:
            self._abandon()
        if not self._open:
            self._begin()
            self._task = task
            _queue_callback(self._finish)

    def before_forward(self) -> None:
        """Forget a backward pass that an exception cut short."""
        if self._open and torch._C._current_graph_task_id() < 0:
            self._abandon()

    def reduce_now(self) -> None:
        """Reduce what `.grad` holds, zeros where it is None, without a backward pass.

        For a rank that has no samples in this step, so that its peers do not wait for it. Takes part in the same
        reductions as a backward pass on the other ranks.
        """
        self.before_forward()
        if self.members:
            self._begin()
            with torch.no_grad():
                self._finish(forgiving=True)

    def _on_gradient(self, member: Member) -> None:
        if not self.enabled:
            member.used = True
            return
        if not self._open:
            self.begin_pass()
        elif torch._C._current_graph_task_id() != self._task:
            # Re-entrant checkpointing runs backward passes within this one, which may give a parameter more gradients.
            self._nested = True
        first = member.number != self.passes
        if first:
            member.number, member.left = self.passes, member.expected
            if self._arrivals is not None:
                self._arrivals.append(member.place)
        member.left -= 1
        bucket = member.bucket
        if bucket is None:
            return
        self._take(member, bucket, first)
        if member.left == 0:
            self._waiting[bucket] -= 1
            if self._waiting[bucket] == 0 and not self._late():
                while len(self._flights) < len(self.buckets) and self._waiting[len(self._flights)] == 0:
                    self._launch()

    def _take(self, member: Member, bucket: int, first: bool) -> None:
        gradient = member.parameter.grad
        assert gradient is not None
        if gradient.requires_grad:
            raise RuntimeError(
                "backward(create_graph=True) through DistributedDataParallel is not supported: the reduction of "
                "gradients is not itself differentiable"
            )
        if gradient.is_sparse:
            raise RuntimeError(
                f"parameter {member.name!r} got a sparse gradient; only those of Embedding and EmbeddingBag with "
                f"sparse=True are expected to be"
            )
        if bucket < len(self._flights):
            why = "where checkpoint(use_reentrant=True) shares parameters, pass static_graph=True"
            if self._static:
                why = "with static_graph=True every pass must give the gradients of the first one"
            raise RuntimeError(f"parameter {member.name!r} got a gradient after its bucket had been launched; {why}")
        self._place(member, gradient, first)

    def _place(self, member: Member, gradient: Tensor, first: bool) -> None:
        """Put the weighted gradient into its slot, or add it; `.grad` is empty until the end of the pass."""
        slot, factor = member.slot, self._exchange.factor(self.weight)
        assert slot is not None
        if not first:
            slot.add_(gradient, alpha=factor)
        elif gradient.data_ptr() == slot.data_ptr():
            if factor != 1.0:
                slot.mul_(factor)
        elif gradient.dtype is slot.dtype:
            torch.mul(gradient, factor, out=slot)
        else:
            slot.copy_(gradient).mul_(factor)
        member.parameter.grad = None

    def _begin(self) -> None:
        # The reductions of a pass that raised must end: their buckets are about to be written again.
        while self._abandoned:
            self._abandoned.pop(0).land()
        if self._next_order is not None:
            self._lay_out(self._next_order)
            self._next_order = None
        self.passes += 1
        self._waiting = self._layout.awaited.copy()
        self._open, self._nested = True, False
        self._task = -1
        self._missing, self._bad = [], []
        if self._arrivals is not None:
            self._arrivals = []

    def _abandon(self) -> None:
        self._abandoned += [flight for flight in self._flights if flight.work is not None]
        self._flights = []
        self._open = False

    def _lay_out(self, order: list[int] | None) -> None:
        with torch.no_grad():
            self._layout.cut(self.members, order)
        self._order = order

    def _late(self) -> bool:
        """Say whether buckets must wait for the end of the pass, since how many gradients will come is not known."""
        return not self._learnt if self._static else self._nested

    def _launch(self) -> None:
        index = len(self._flights)
        bucket = self.buckets[index]
        if self._check_finite:
            self._bad += non_finite(bucket, self.members)
        if self.before_bucket is not None:
            self.before_bucket(bucket)
        if index == len(self.buckets) - 1 and self._layout.flags_ride:
            self._layout.raise_flags(self._missing, len(self._bad))
        if self._exchange.rounds > 1:
            for flight in self._flights:
                flight.advance()
        self._flights.append(Flight(self._exchange.start(index, bucket, self._layout.messages[index])))

    def _finish(self, forgiving: bool = False) -> None:
        try:
            # Those that a static graph never has a gradient of are not missing; their slots hold zeros.
            self._missing = [each for each in self.members if each.number != self.passes and each.expected > 0]
            if self._missing:
                if not (self._find_unused or forgiving):
                    raise RuntimeError(
                        f"rank {self._comm.rank}: {len(self._missing)} of {len(self.members)} parameters got no "
                        f"gradient in this backward pass: {named_briefly(self._missing)}; use them in the loss, freeze "
                        f"them with requires_grad_(False), or allow it with find_unused_parameters=True"
                    )
                self._fill_in()
            while len(self._flights) < len(self.buckets):
                self._launch()
            self._await()
            if self._check_finite and self._layout.flags[-1].real > 0:
                report_non_finite(self._bad, self._comm)
            self._hand_out()
            self._learn()
        finally:
            self._abandon()
            if self._usual_weight is not None:
                self.weight, self._usual_weight = self._usual_weight, None

    def _fill_in(self) -> None:
        """Have the parameters without a gradient contribute what `.grad` holds, else zeros."""
        for member in self._missing:
            if member.slot is not None:
                member.kept = member.private_gradient()
                if member.parameter.grad is None:
                    member.slot.zero_()
                else:
                    self._place(member, member.parameter.grad, True)

    def _await(self) -> None:
        flags: Waitable | None = None
        if not self._layout.flags_ride:
            self._layout.raise_flags(self._missing, len(self._bad))
            flags = self._comm.all_reduce(self._layout.flags)
        for number, (bucket, flight) in enumerate(zip(self.buckets, self._flights, strict=True), 1):
            with located(f"bucket {number} of {len(self.buckets)}"):
                flight.land()
            if self.after_bucket is not None:
                self.after_bucket(bucket)
        if flags is not None:
            flags.wait()
        for member in self.members:
            if member.bucket is None:
                factor = self._exchange.factor(self.weight)
                member.parameter.grad = gather_sparse(member.parameter, member.parameter.grad, factor, self._comm)

    def _hand_out(self) -> None:
        """Make `.grad` of every parameter that any rank had a gradient of a view of its bucket."""
        whole = self._exchange.whole
        if self.unused:
            self.unused = set()
        for member in self.members:
            slot = member.slot
            if slot is not None and member.expected > 0:
                dtype = member.parameter.dtype
                member.parameter.grad = None if not whole else slot if slot.dtype is dtype else slot.to(dtype)
            member.used = False
        if self._missing:
            used = self._layout.used_by()
            for member in self._missing:
                if used[member.place] == 0:
                    self.unused.add(id(member.parameter))
                    if member.slot is not None:
                        member.parameter.grad = member.kept
                member.kept = None

    def _learn(self) -> None:
        """After the first pass: agree on the order of buckets, and remember what a static graph does."""
        if self._arrivals is not None:
            order = torch.tensor(self._arrivals + [member.place for member in reversed(self._missing)])
            self._next_order = self._comm.broadcast(order).wait().tolist()
            self._arrivals = None
        if self._static and not self._learnt:
            self._learnt = True
            used = self._layout.used_by()
            for member in self.members:
                if member.number == self.passes:
                    member.expected -= member.left
                elif used[member.place] == 0:
                    member.expected = 0
                    if member.slot is not None:
                        member.slot.zero_()
            self._layout.count_expected(self.members)


def _acting(alive: "weakref.ref[Reducer]", member: Member) -> Callable[[], None]:
    def act() -> None:
        reducer = alive()
        if reducer is not None:
            reducer._on_gradient(member)

    return act


def _queue_callback(function: Callable[[], None]) -> None:
    """Have autograd call `function` when the backward pass that runs now has ended, before `backward` returns."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # torch's DDP and FSDP use it too
