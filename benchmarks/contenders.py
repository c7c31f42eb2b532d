"""One who takes the training step that all contenders take, timed by phases and checked.

All take forward, backward, and the same optimizer's step, from the same start and with the same batches. A step's
seconds are

    step = forward + backward + optimizer + exposed communication,

where "optimizer" includes dropping the old gradients and "exposed" is what is left of communication after overlap:
the time in which the training thread waits instead of computing. Ours counts it where it waits; torch's DDP waits
inside `backward` and does not tell, so that its backward here still contains it.

`check` proves in the very configuration that is timed that the step is the right one. With per-rank means of equally
many samples, the average of the ranks' gradients is the gradient of the mean over all samples, so that one process
with the whole mini-batch is the reference; they differ by rounding alone. The parameters must then be what a serial
optimizer makes of that gradient.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator, Traffic
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.gradients.sharded import Groups
from benchmarks.workloads import Workload

__all__ = [
    "GRADIENT_TOLERANCE",
    "OPTIMIZERS",
    "Compressed",
    "Contender",
    "Reference",
    "Sharded",
    "Turn",
    "bucket_parameters",
    "reference",
]

_FIRST_BETA = 0.9
OPTIMIZERS: Mapping[str, Callable[[Groups], torch.optim.Optimizer]] = MappingProxyType(
    {
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.001, betas=(_FIRST_BETA, 0.999)),
    }
)
# What each keeps is, after one step, the gradient times a factor.
_MOMENTS = MappingProxyType({"sgd": ("momentum_buffer", 1.0), "adamw": ("exp_avg", 1 - _FIRST_BETA)})
# Float32 rounding stays well below: sums of a few thousand terms in another order differ by some 1e-6.
GRADIENT_TOLERANCE = 1e-4
_PARAMETER_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Turn:
    """What one rank measured over the steps of one round: seconds and bytes per step.

    `backward_seconds` contains waiting where the contender does not tell it, and `exposed_seconds` is None then;
    `sent_bytes` likewise.
    """

    seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    exposed_seconds: float | None
    sent_bytes: float | None


@dataclass(frozen=True)
class Reference:
    """The gradients of one serial step with the mini-batches of all ranks."""

    gradients: Sequence[Tensor]


class Contender:
    """One way of taking the step. All ranks take turns together, except where only rank 0 computes.

    `name` is that of the record, `setting` tells variants of it apart; `module` holds the parameters that `replica`
    trains, `optimizer` is the name of what `stepper` does; `traffic` is what the replica's communication is counted in,
    None where nobody counts it. `tolerance` bounds the relative error of gradients, None where they are not checked.
    """

    def __init__(
        self,
        name: str,
        setting: str,
        module: nn.Module,
        replica: nn.Module,
        traffic: Traffic | None,
        optimizer: str = "sgd",
        stepper: torch.optim.Optimizer | None = None,
        tolerance: float | None = GRADIENT_TOLERANCE,
    ) -> None:
        self.name = name
        self.setting = setting
        self.synchronises = replica is not module
        self.module = module
        self.replica = replica
        self.parameters = list(module.parameters())
        self.stepper = OPTIMIZERS[optimizer]([{"params": self.parameters}]) if stepper is None else stepper
        self._optimizer = optimizer
        self._start = [parameter.detach().clone() for parameter in self.parameters]
        self._traffic = traffic
        self._tolerance = tolerance

    @property
    def label(self) -> str:
        return f"{self.name} {self.setting}".rstrip()

    def reset(self) -> None:
        """Go back to the start, so that no round trains on: overfitted gradients end in slow denormal numbers."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._start, strict=True):
                parameter.copy_(value)
        self.stepper.zero_grad()
        self.stepper.state.clear()

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Take one step."""
        self.stepper.zero_grad()
        functional.cross_entropy(self.replica(batch[0]), batch[1]).backward()
        self.stepper.step()

    def turn(self, batch: tuple[Tensor, Tensor], steps: int) -> Turn:
        """Take `steps` steps and return their means."""
        traffic = self._traffic or Traffic(counts_bytes=False)
        sent_before, waited_before = traffic.bytes_sent, traffic.waited_seconds
        forward = backward = optimizer = 0.0
        began = time.perf_counter()
        for _ in range(steps):
            start, waited_at_start = time.perf_counter(), traffic.waited_seconds
            self.stepper.zero_grad()
            cleared = time.perf_counter()
            loss = functional.cross_entropy(self.replica(batch[0]), batch[1])
            computed, waited_forward = time.perf_counter(), traffic.waited_seconds
            loss.backward()
            differentiated, waited_backward = time.perf_counter(), traffic.waited_seconds
            self.stepper.step()
            optimizer += time.perf_counter() - differentiated + cleared - start
            optimizer -= traffic.waited_seconds - waited_backward
            forward += computed - cleared - (waited_forward - waited_at_start)
            backward += differentiated - computed - (waited_backward - waited_forward)
        total = time.perf_counter() - began
        sent = None if sent_before is None or traffic.bytes_sent is None else traffic.bytes_sent - sent_before
        return Turn(
            total / steps,
            forward / steps,
            backward / steps,
            optimizer / steps,
            None if self._traffic is None else (traffic.waited_seconds - waited_before) / steps,
            None if sent is None else sent / steps,
        )

    def applied_gradients(self) -> Sequence[Tensor | None]:
        """Return the gradients that the first step after the start applied. All ranks must call."""
        return [parameter.grad for parameter in self.parameters]

    def compared_gradients(self, applied: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return what of them must be equal to a serial step's. All ranks must call."""
        return applied

    @torch.no_grad()
    def check(self, truth: Reference) -> str | None:
        """Say what is wrong with this rank's gradients and parameters one step after the start; None if nothing is.

        All ranks that took the step must call.
        """
        applied = self.applied_gradients()
        for index, (gradient, expected) in enumerate(
            zip(self.compared_gradients(applied), truth.gradients, strict=True)
        ):
            if gradient is None:
                return f"parameter {index} has no gradient"
            error, size = float((gradient - expected).norm()), float(expected.norm())
            if self._tolerance is not None and not error <= self._tolerance * size:
                return f"the gradient of parameter {index} is off by {error:.3g}, of {size:.3g}"
        twins = [nn.Parameter(value.clone()) for value in self._start]
        for twin, gradient in zip(twins, applied, strict=True):
            twin.grad = gradient
        OPTIMIZERS[self._optimizer]([{"params": twins}]).step()
        for index, (parameter, twin, start) in enumerate(zip(self.parameters, twins, self._start, strict=True)):
            # The rounding of parameters counts beside that of the update, which is much smaller than they are.
            update = float((twin - start).norm())
            allowed = GRADIENT_TOLERANCE * update + _PARAMETER_TOLERANCE * float(twin.norm())
            error = float((parameter - twin).norm())
            if not error <= allowed:
                return f"parameter {index} is off by {error:.3g} after an update of {update:.3g}"
        return None


class Sharded(Contender):
    """A step whose gradients no rank has as a whole: after the first they are what the optimizer's moment shows."""

    def applied_gradients(self) -> Sequence[Tensor | None]:
        state = self.stepper.state_dict()["state"]
        key, factor = _MOMENTS[self._optimizer]
        return [state[index][key] / factor if index in state else None for index in range(len(self.parameters))]


class Compressed(Contender):
    """A step with codecs: what they sent and what they kept back, of all ranks together, is the gradient."""

    def __init__(
        self,
        name: str,
        setting: str,
        module: nn.Module,
        replica: DistributedDataParallel,
        comm: Communicator,
        optimizer: str,
        tolerance: float | None,
    ) -> None:
        super().__init__(name, setting, module, replica, comm.traffic, optimizer, None, tolerance)
        self._ddp = replica
        self._comm = comm
        self._fresh = copy.deepcopy(replica.codec_state_dict())

    def reset(self) -> None:
        super().reset()
        self._ddp.load_codec_state_dict(list(self._fresh))

    def compared_gradients(self, applied: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        whole = list(applied)
        for state, indices in zip(self._ddp.codec_state_dict(), bucket_parameters(self._ddp), strict=True):
            # What deep gradient compression keeps has another name.
            kept_back = state.get("residual", state.get("unsent"))
            if kept_back is None:
                continue
            total = self._comm.all_reduce(kept_back.clone()).wait()
            start = 0
            for index in indices:
                shape = self.parameters[index].shape
                gradient = applied[index]
                if gradient is not None:
                    whole[index] = gradient + total[start : start + shape.numel()].view(shape)
                start += shape.numel()
        return whole


def bucket_parameters(replica: DistributedDataParallel) -> list[list[int]]:
    """Return the indices of the parameters in each bucket, in the order in which they lie there.

    For modules of one dtype all of whose parameters are trained.
    """
    parameters = list(replica.module.parameters())
    order = iter(replica.bucket_order() or reversed(range(len(parameters))))
    buckets = []
    for n_bytes in replica.bucket_bytes():
        indices: list[int] = []
        while sum(parameters[index].nbytes for index in indices) < n_bytes:
            indices.append(next(order))
        buckets.append(indices)
    return buckets


def reference(workload: Workload, ranks: int) -> Reference:
    """Take one serial step with the mini-batches of all ranks."""
    module = workload.build()
    batches = [workload.batch(rank) for rank in range(ranks)]
    outputs = module(torch.cat([inputs for inputs, _ in batches]))
    functional.cross_entropy(outputs, torch.cat([labels for _, labels in batches])).backward()
    return Reference([parameter.grad for parameter in module.parameters() if parameter.grad is not None])
