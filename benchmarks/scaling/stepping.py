"""How long a training step takes with so many ranks: computing, waiting for the slowest, what of communication shows.

Synchronous SGD: buckets are cut by the trainer's own rule in the order in which gradients arrive, and with bucket j
ready at r_j, e_j = max(e_{j-1}, r_j) + c_j and step = F + max(B, e_last) + O (`benchmarks.overlap`, with its factor for
computing beside a reduction). All computing is stretched by what the slowest of the ranks takes (`stragglers`).

Local SGD, period H: H steps of computing, of which the slowest sum counts, then an all-reduce of every bucket, which
nothing hides; with a delay τ it is hidden behind τ steps. Delayed SGD, τ > 0: the sums of one step travel while later
ones are computed, so that a step takes the longer of both; a rank may be up to τ steps late, so the slowest sum of
τ + 1 steps counts.

A codec sends `ratio` bytes for each, in the two phases of quantised signals, or gathered from all ranks; it encodes a
bucket when that is ready and decodes the last one at the end, by the same core that computes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from allreduce_sgd.gradients.buckets import assign
from benchmarks.overlap import Parts, overlap_bound
from benchmarks.scaling.handling import NO_HANDLING, Handling
from benchmarks.scaling.profile import Compute
from benchmarks.scaling.reductions import Reduction, Reductions
from benchmarks.scaling.stragglers import NO_STRAGGLERS, Stragglers

__all__ = ["NO_CODEC", "Codec", "Plan", "StepTime", "buckets_of", "step_time"]

_MIB = 1 << 20
_FLAG_BYTES = 4

StrategyName = Literal["sync", "local", "delayed"]


@dataclass(frozen=True)
class Codec:
    """`ratio`: bytes sent for each byte of the signal; half of `seconds_per_byte` is encoding, half decoding."""

    name: str = "none"
    ratio: float = 1.0
    seconds_per_byte: float = 0.0
    exchange: Literal["reduce", "two phases", "gather"] = "reduce"
    measured: bool = False


NO_CODEC = Codec()


@dataclass(frozen=True)
class Plan:
    """What the trainer is told: `period` of local SGD, `delay` in steps of local and delayed SGD."""

    strategy: StrategyName = "sync"
    period: int = 1
    delay: int = 0
    bucket_mb: float = 25.0
    first_bucket_mb: float = 1.0
    codec: Codec = NO_CODEC

    @property
    def label(self) -> str:
        details = [f"period {self.period}"] if self.strategy == "local" else []
        details += [f"delay {self.delay}"] if self.delay else []
        details += [self.codec.name] if self.codec != NO_CODEC else []
        return ", ".join([self.strategy, *details])


@dataclass(frozen=True)
class StepTime:
    """A mean step, in seconds: the sum of the three phases, of waiting for the slowest rank, and of what shows of
    communication (`exposed_seconds`, computing slowed by a reduction under way included). `bytes_sent` by the rank that
    sends most."""

    seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    straggler_seconds: float
    exposed_seconds: float
    reduction_seconds: float
    bytes_sent: float
    buckets: int
    reductions: tuple[Reduction, ...]

    def fields(self) -> dict[str, Any]:
        """Return the columns of a row, with how the buckets were reduced."""
        kept = {name: value for name, value in vars(self).items() if name not in ("reductions", "seconds")}
        algorithms = list(dict.fromkeys(each.algorithm for each in self.reductions))
        methods = list(dict.fromkeys(each.method for each in self.reductions))
        return {"step_seconds": self.seconds, **kept, "algorithms": algorithms, "reduction_methods": methods}


def buckets_of(compute: Compute, bucket_mb: float, first_bucket_mb: float) -> list[list[int]]:
    """Return the parameters of each bucket as the trainer cuts them from the second step on."""
    arrivals = compute.arrival_seconds
    order = sorted(range(len(arrivals)), key=lambda index: (arrivals[index], -index))
    # The rule looks at sizes and dtypes only.
    shapes = [torch.empty(n_bytes // _FLAG_BYTES, device="meta") for n_bytes in compute.parameter_bytes]
    return assign(shapes, first_bucket_mb * _MIB, bucket_mb * _MIB, order)


def step_time(
    compute: Compute,
    ranks: int,
    reductions: Reductions,
    plan: Plan,
    stragglers: Stragglers = NO_STRAGGLERS,
    handling: Handling = NO_HANDLING,
) -> StepTime:
    """Return the mean time of a step of `ranks` ranks, each of which computes `compute`."""
    if ranks == 1:
        return _result(compute, compute.seconds, compute.seconds, [], 0.0, 0)
    # Averages of models have no gradients to wait for, and so no smaller first bucket.
    first_bucket_mb = plan.bucket_mb if plan.strategy == "local" else plan.first_bucket_mb
    buckets = buckets_of(compute, plan.bucket_mb, first_bucket_mb)
    sizes = [float(sum(compute.parameter_bytes[index] for index in bucket)) for bucket in buckets]
    if plan.strategy != "local":
        # Which parameters were used rides at the end of the last message.
        sizes[-1] += _FLAG_BYTES * (len(compute.parameter_bytes) + 1)
    found = [_exchange(ranks, n_bytes, reductions, plan.codec) for n_bytes in sizes]
    coding = [n_bytes * plan.codec.seconds_per_byte / 2 for n_bytes in sizes]
    seconds = [each.seconds for each in found]
    if plan.strategy == "sync":
        stretched = compute.seconds * stragglers.slowest(ranks)
        step = _synchronous(compute, buckets, seconds, coding, stretched / compute.seconds, handling)
        return _result(compute, stretched, step, found, 1.0, len(buckets))
    reduced, extra = sum(seconds), 2 * sum(coding)
    if plan.strategy == "local":
        stretched = compute.seconds * stragglers.slowest(ranks, plan.period)
        shown = _beyond(plan.delay * stretched, reduced, compute.contention) + extra
        return _result(compute, stretched, stretched + shown / plan.period, found, 1 / plan.period, len(buckets))
    stretched = compute.seconds * stragglers.slowest(ranks, plan.delay + 1)
    busy = stretched + extra + handling.hook_seconds * len(compute.parameter_bytes)
    busy += handling.seconds_per_byte * compute.total_bytes
    reduced += handling.bucket_seconds * len(buckets)
    step = busy + _beyond(busy, reduced, compute.contention)
    return _result(compute, stretched, step, found, 1.0, len(buckets))


def _synchronous(
    compute: Compute,
    buckets: Sequence[Sequence[int]],
    reductions: Sequence[float],
    coding: Sequence[float],
    stretch: float,
    handling: Handling,
) -> float:
    """Return the step of the overlap recursion; hooks, copying and encoding delay what comes after them."""
    handed = list(itertools.accumulate(_handing(compute, bucket, handling) for bucket in buckets))
    encoded = list(itertools.accumulate(coding))
    ready = [
        stretch * max(compute.arrival_seconds[index] for index in bucket) + before + delay
        for bucket, before, delay in zip(buckets, handed, encoded, strict=True)
    ]
    # Buckets are sent in order.
    ready = list(itertools.accumulate(ready, max))
    backward = max(ready[-1], stretch * compute.backward_seconds + handed[-1] + encoded[-1])
    forward, optimizer = stretch * compute.forward_seconds, stretch * compute.optimizer_seconds
    reduced = [each + handling.bucket_seconds for each in reductions]
    return overlap_bound(Parts(forward, ready, backward, optimizer + encoded[-1], reduced, compute.contention))


def _handing(compute: Compute, bucket: Sequence[int], handling: Handling) -> float:
    """Return what the computing core spends to bring the gradients of a bucket into it."""
    n_bytes = sum(compute.parameter_bytes[index] for index in bucket)
    return len(bucket) * handling.hook_seconds + n_bytes * handling.seconds_per_byte


def _beyond(computing: float, reducing: float, contention: float) -> float:
    """Return by how much computing that starts together with reducing gets longer until both are done."""
    return overlap_bound(Parts(0.0, [0.0], computing, 0.0, [reducing], contention)) - computing


def _exchange(ranks: int, n_bytes: float, reductions: Reductions, codec: Codec) -> Reduction:
    if codec.exchange == "gather":
        return reductions.all_gather(ranks, codec.ratio * n_bytes)
    if codec.exchange == "two phases":
        return reductions.two_phases(ranks, codec.ratio * n_bytes)
    return reductions.all_reduce(ranks, codec.ratio * n_bytes)


def _result(
    compute: Compute, stretched: float, step: float, found: Sequence[Reduction], share: float, buckets: int
) -> StepTime:
    return StepTime(
        step,
        compute.forward_seconds,
        compute.backward_seconds,
        compute.optimizer_seconds,
        stretched - compute.seconds,
        max(0.0, step - stretched),
        share * sum(each.seconds for each in found),
        share * sum(each.bytes_sent for each in found),
        buckets,
        tuple(found),
    )
