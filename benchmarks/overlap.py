"""How short a step could be if every bucket were reduced as soon as it is ready: the bound of overlap.

With the seconds of the forward pass F, of the backward pass B and of the optimizer O, bucket j ready r_j after the
backward pass began, and an all-reduce of its bytes alone c_j:

    e_j = max(e_{j-1}, r_j) + c_j,        step = F + max(B, e_last) + O.

On a CPU the ranks' cores also move the data, so that computing is slower by a factor f ≥ 1 while a reduction is under
way; the bound above is that with f = 1. Everything is measured in the same round as the contenders, by three turns:

- the bare module steps, on all ranks at once, and hooks note when gradients come: F, B, O and r_j
- nobody computes, and the buckets are all-reduced one by one: c_j
- the bare module steps while all-reduces of the largest bucket follow one another: f

It is a bound for what an all-reduce of these buckets by this communicator can hide; what updates parameters on one rank
only, or sends less, can be faster.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from benchmarks.contenders import OPTIMIZERS, bucket_parameters
from benchmarks.workloads import Workload

__all__ = ["OverlapProbe", "Parts", "overlap_bound"]

_REDUCTIONS = 5
# A generous estimate of how many all-reduces it takes to be busy as long as the steps last.
_MARGIN = 1.3
_MOST_IN_FLIGHT = 10_000


@dataclass(frozen=True)
class Parts:
    """What a step is made of, in seconds: `ready` after the beginning of the backward pass, `reductions` alone.

    `contention` is what computing times are multiplied by while a reduction is under way.
    """

    forward_seconds: float
    ready_seconds: Sequence[float]
    backward_seconds: float
    optimizer_seconds: float
    reduction_seconds: Sequence[float]
    contention: float


def overlap_bound(parts: Parts) -> float:
    """Return the least seconds of a step that reduces every bucket, in order, while it computes the rest."""
    now = computed = reduced = 0.0
    for ready, reduction in zip(parts.ready_seconds, parts.reduction_seconds, strict=True):
        now = _compute(ready - computed, now, reduced, parts.contention)
        computed = ready
        reduced = max(reduced, now) + reduction
    now = _compute(parts.backward_seconds - computed, now, reduced, parts.contention)
    return parts.forward_seconds + max(now, reduced) + parts.optimizer_seconds


def _compute(seconds: float, now: float, busy_until: float, contention: float) -> float:
    """Return when computing ends that starts now and takes so long on its own."""
    beside = min(seconds * contention, max(0.0, busy_until - now))
    return now + beside + seconds - beside / contention


class OverlapProbe:
    """Measures the parts. All ranks must make it, and call `turn`, together."""

    def __init__(self, workload: Workload, comm: Communicator, optimizer: str) -> None:
        self._comm = comm
        self._batch = workload.batch(comm.rank)
        replica = DistributedDataParallel(workload.build(), comm)
        for _ in range(2):
            # Buckets are cut anew for the second pass, in the order in which gradients arrive.
            functional.cross_entropy(replica(self._batch[0]), self._batch[1]).backward()
        self._buckets = bucket_parameters(replica)
        parameters = list(replica.module.parameters())
        self._messages = [
            comm.allocate(n_bytes // parameters[0].element_size(), parameters[0].dtype, parameters[0].device)
            for n_bytes in replica.bucket_bytes()
        ]
        self._module = workload.build()
        self._start = [parameter.detach().clone() for parameter in self._module.parameters()]
        self._optimizer = OPTIMIZERS[optimizer]([{"params": self._module.parameters()}])
        self._arrived = [0.0] * len(self._start)
        for index, parameter in enumerate(self._module.parameters()):
            parameter.register_post_accumulate_grad_hook(self._note(index))

    def turn(self, steps: int) -> Parts:
        """Measure the parts of a step, the same on all ranks: computing of the slowest rank, reductions of the last."""
        self._reset()
        self._steps(max(1, steps // 4))
        self._comm.barrier().wait()
        mine = self._steps(steps)
        everyone: list[list[float]] = all_gather_object(self._comm, mine)
        forward, backward, optimizer, *ready = max(everyone, key=lambda parts: sum(parts[:3]))
        alone: list[list[float]] = all_gather_object(self._comm, self._reduce_alone())
        reductions = [max(seconds) for seconds in zip(*alone, strict=True)]
        compute = forward + backward + optimizer
        contended: list[float] = all_gather_object(self._comm, self._contended(steps, compute, max(reductions)))
        return Parts(forward, ready, backward, optimizer, reductions, max(1.0, max(contended) / compute))

    def _reset(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._module.parameters(), self._start, strict=True):
                parameter.copy_(value)
        self._optimizer.state.clear()

    def _note(self, index: int) -> "_Note":
        return _Note(self._arrived, index)

    def _steps(self, steps: int) -> list[float]:
        """Take steps, and return the mean seconds of forward, backward, optimizer, and until each bucket is ready."""
        sums = [0.0] * (3 + len(self._buckets))
        for _ in range(steps):
            start = time.perf_counter()
            self._optimizer.zero_grad()
            cleared = time.perf_counter()
            loss = functional.cross_entropy(self._module(self._batch[0]), self._batch[1])
            computed = time.perf_counter()
            loss.backward()
            differentiated = time.perf_counter()
            self._optimizer.step()
            stepped = time.perf_counter()
            ready = [max(self._arrived[index] for index in bucket) - computed for bucket in self._buckets]
            phases = (computed - cleared, differentiated - computed, stepped - differentiated + cleared - start)
            sums = [total + part for total, part in zip(sums, (*phases, *ready), strict=True)]
        return [total / steps for total in sums]

    def _reduce_alone(self) -> list[float]:
        """Return the seconds of an all-reduce of each bucket's bytes while nobody computes."""
        return [statistics.median(self._reduce(message) for _ in range(_REDUCTIONS)) for message in self._messages]

    def _reduce(self, message: Tensor) -> float:
        self._comm.barrier().wait()
        start = time.perf_counter()
        self._comm.all_reduce(message).wait()
        return time.perf_counter() - start

    def _contended(self, steps: int, step_seconds: float, reduction_seconds: float) -> float:
        """Return the mean seconds of a step during which all-reduces follow one another."""
        in_flight = math.ceil(_MARGIN * steps * step_seconds / max(reduction_seconds, 1e-6))
        message = max(self._messages, key=lambda each: each.numel())
        self._comm.barrier().wait()
        works: list[Work] = [self._comm.all_reduce(message) for _ in range(min(in_flight, _MOST_IN_FLIGHT))]
        seconds = sum(self._steps(steps)[:3])
        for work in works:
            work.wait()
        return seconds


class _Note:
    """A hook that notes when it was called."""

    def __init__(self, times: list[float], index: int) -> None:
        self._times = times
        self._index = index

    def __call__(self, parameter: nn.Parameter) -> None:
        self._times[self._index] = time.perf_counter()
