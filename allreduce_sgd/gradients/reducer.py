"""Overlap: buckets are all-reduced in index order while back-propagation is still computing the other gradients.

After Li et al., "PyTorch Distributed", VLDB 2020, arXiv 2006.15704. A hook runs when a parameter's gradient has been
accumulated: it copies the gradient, times its weight, into the bucket, and makes `.grad` a view of the bucket, so that
nothing is copied back. A bucket whose gradients are all there is launched once the buckets before it have been: every
rank launches the same sequence, whatever order its own gradients arrive in.

Differences from PyTorch DDP: completion is awaited by a callback queued at the first hook of a backward pass, not when
the last bucket launches, so a parameter that got no gradient raises in that very backward pass, by name, instead of
hanging the peers; buckets are sized the same in the first pass as later, so the first step overlaps too.

Bytes per rank and step: those of the communicator's all-reduce for every bucket.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.gradients.buckets import Bucket, build_buckets

__all__ = ["Reducer"]

_NAMES_SHOWN = 5


class Reducer:
    """Reduces the gradients of named parameters over all ranks. All ranks must construct it, and step it, together.

    While `enabled`, every backward pass ends with each parameter's `.grad` = sum over ranks of weight times gradient.
    `weight` is this rank's, 1/size at first, which gives the average.
    """

    def __init__(
        self,
        parameters: list[tuple[str, nn.Parameter]],
        comm: Communicator,
        bucket_mb: float,
        first_bucket_mb: float,
    ) -> None:
        self.enabled = True
        self.weight = 1.0 / comm.size
        self._comm = comm
        self._names = {parameter: name for name, parameter in parameters}
        trainable = [parameter for _, parameter in parameters]
        self.buckets = build_buckets(trainable, comm, first_bucket_mb * 2**20, bucket_mb * 2**20)
        self._works: list[Work] = []
        self._abandoned: list[Work] = []
        self._arrived: set[nn.Parameter] = set()
        # Weakly: hooks live as long as the parameters, and must not act for a wrapper that is gone.
        alive = weakref.ref(self)
        for index, bucket in enumerate(self.buckets):
            for position, parameter in enumerate(bucket.parameters):
                hook = parameter.register_post_accumulate_grad_hook(partial(_forward_to, alive, index, position))
                weakref.finalize(self, hook.remove)

    def reduce_now(self) -> None:
        """Reduce what `.grad` holds, zeros where it is None, without a backward pass.

        For a rank that has no samples in this step, so that its peers do not wait for it. Takes part in the same
        reductions as a backward pass on the other ranks.
        """
        self._begin()
        with torch.no_grad():
            for bucket in self.buckets:
                for position, parameter in enumerate(bucket.parameters):
                    self._place(bucket, position, parameter)
                self._launch(bucket)
        self._await()

    def _on_gradient(self, index: int, position: int, parameter: nn.Parameter) -> None:
        if not self.enabled:
            return
        bucket = self.buckets[index]
        if parameter in self._arrived:
            self._reset()
            raise RuntimeError(
                f"parameter {self._names[parameter]!r} got a second gradient before its reduction ended: a backward "
                f"pass was cut short by an exception, or is nested in another"
            )
        assert parameter.grad is not None
        if parameter.grad.requires_grad:
            raise RuntimeError(
                "backward(create_graph=True) through DistributedDataParallel is not supported: the reduction of "
                "gradients is not itself differentiable"
            )
        if not self._arrived:
            self._begin()
            _queue_callback(self._finish)
        self._arrived.add(parameter)
        self._place(bucket, position, parameter)
        bucket.waiting_for -= 1
        while len(self._works) < len(self.buckets) and self.buckets[len(self._works)].waiting_for == 0:
            self._launch(self.buckets[len(self._works)])

    def _place(self, bucket: Bucket, position: int, parameter: nn.Parameter) -> None:
        """Put the weighted gradient into its slot, and make `.grad` that slot."""
        slot, gradient = bucket.slots[position], parameter.grad
        if gradient is None:
            slot.zero_()
        elif gradient.data_ptr() != slot.data_ptr():
            torch.mul(gradient, self.weight, out=slot)
        elif self.weight != 1.0:
            slot.mul_(self.weight)
        if gradient is not slot:
            parameter.grad = slot

    def _begin(self) -> None:
        """Let the reductions of a backward pass that raised end: their buckets are about to be written again."""
        while self._abandoned:
            self._abandoned[0].wait()
            self._abandoned.pop(0)

    def _launch(self, bucket: Bucket) -> None:
        self._works.append(self._comm.all_reduce(bucket.buffer))

    def _finish(self) -> None:
        missing = [name for parameter, name in self._names.items() if parameter not in self._arrived]
        if missing:
            self._reset()
            shown = ", ".join(missing[:_NAMES_SHOWN]) + (", ..." if len(missing) > _NAMES_SHOWN else "")
            raise RuntimeError(
                f"rank {self._comm.rank}: {len(missing)} of {len(self._names)} parameters got no gradient in this "
                f"backward pass: {shown}; freeze them with requires_grad_(False) or use them in the loss"
            )
        self._await()

    def _await(self) -> None:
        try:
            for work in self._works:
                work.wait()
        finally:
            self._reset()

    def _reset(self) -> None:
        self._abandoned += [work for work in self._works if not work.done()]
        self._works = []
        self._arrived = set()
        for bucket in self.buckets:
            bucket.waiting_for = len(bucket.parameters)


def _forward_to(alive: "weakref.ref[Reducer]", index: int, position: int, parameter: nn.Parameter) -> None:
    reducer = alive()
    if reducer is not None:
        reducer._on_gradient(index, position, parameter)


def _queue_callback(function: Callable[[], None]) -> None:
    """Have autograd call `function` when the backward pass that runs now has ended, before `backward` returns."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # torch's DDP and FSDP use it too
