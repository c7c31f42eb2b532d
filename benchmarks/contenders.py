"""Who takes the same training step: the bare module, our DistributedDataParallel, and torch's over Gloo.

All take forward, backward, SGD with momentum 0.9, from the same start and with the same batches. A step's seconds are

    step = forward + backward + optimizer + exposed communication,

where "optimizer" includes dropping the old gradients and "exposed" is what is left of communication after overlap:
the time in which the training thread waits instead of computing. Ours counts it where it waits; torch's DDP waits
inside `backward` and does not tell, so that its backward here still contains it.

`check` proves in the very configuration that is timed that the step is the right one. With per-rank means of equally
many samples, the average of the ranks' gradients is the gradient of the mean over all samples, so that one process
with the whole mini-batch is the reference; they differ by rounding alone.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator, Traffic
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from benchmarks.workloads import Workload

__all__ = ["Contender", "Reference", "Turn", "contenders", "reference"]

_LEARNING_RATE = 0.01
_MOMENTUM = 0.9
_TORCH_BUCKETS_MB = (25, 5)
# Float32 rounding stays well below: sums of a few thousand terms in another order differ by some 1e-6.
_GRADIENT_TOLERANCE = 1e-4
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
    """The parameters before and after one serial step with the mini-batches of all ranks, and its gradients."""

    start: Sequence[Tensor]
    gradients: Sequence[Tensor]
    end: Sequence[Tensor]


class Contender:
    """One way of taking the step. All ranks take turns together, except where only rank 0 computes.

    `name` is that of the record, `setting` tells variants of it apart; `module` holds the parameters that `replica`
    trains; `traffic` is what the replica's communication is counted in, None where nobody counts it.
    """

    def __init__(self, name: str, setting: str, module: nn.Module, replica: nn.Module, traffic: Traffic | None) -> None:
        self.name = name
        self.setting = setting
        self.synchronises = replica is not module
        self.module = module
        self._parameters = list(module.parameters())
        self._start = [parameter.detach().clone() for parameter in self._parameters]
        self._replica = replica
        self._optimizer = _sgd(self._parameters)
        self._traffic = traffic

    @property
    def label(self) -> str:
        return f"{self.name} {self.setting}".rstrip()

    def reset(self) -> None:
        """Go back to the start, so that no round trains on: overfitted gradients end in slow denormal numbers."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._start, strict=True):
                parameter.copy_(value)
        self._optimizer.zero_grad()
        self._optimizer.state.clear()

    def turn(self, batch: tuple[Tensor, Tensor], steps: int) -> Turn:
        """Take `steps` steps and return their means."""
        traffic = self._traffic or Traffic(bytes_sent=None)
        sent_before, waited_before = traffic.bytes_sent, traffic.waited_seconds
        forward = backward = optimizer = 0.0
        began = time.perf_counter()
        for _ in range(steps):
            start = time.perf_counter()
            self._optimizer.zero_grad()
            cleared = time.perf_counter()
            loss = functional.cross_entropy(self._replica(batch[0]), batch[1])
            computed = time.perf_counter()
            loss.backward()
            differentiated = time.perf_counter()
            self._optimizer.step()
            optimizer += time.perf_counter() - differentiated + cleared - start
            forward += computed - cleared
            backward += differentiated - computed
        total = time.perf_counter() - began
        waited = None if self._traffic is None else traffic.waited_seconds - waited_before
        sent = None if sent_before is None or traffic.bytes_sent is None else traffic.bytes_sent - sent_before
        return Turn(
            total / steps,
            forward / steps,
            (backward - (waited or 0.0)) / steps,
            optimizer / steps,
            None if waited is None else waited / steps,
            None if sent is None else sent / steps,
        )

    def check(self, truth: Reference) -> str | None:
        """Say what is wrong with this rank's gradients and parameters one step after the start; None if nothing is."""
        for index, parameter in enumerate(self._parameters):
            expected = truth.gradients[index]
            if parameter.grad is None:
                return f"parameter {index} has no gradient"
            error = float((parameter.grad - expected).norm())
            if not error <= _GRADIENT_TOLERANCE * float(expected.norm()):
                return f"the gradient of parameter {index} is off by {error:.3g}, of {float(expected.norm()):.3g}"
            # The rounding of parameters counts beside that of the update, which is much smaller than they are.
            update = float((truth.end[index] - truth.start[index]).norm())
            allowed = _GRADIENT_TOLERANCE * update + _PARAMETER_TOLERANCE * float(truth.end[index].norm())
            error = float((parameter.detach() - truth.end[index]).norm())
            if not error <= allowed:
                return f"parameter {index} is off by {error:.3g} after an update of {update:.3g}"
        return None


def contenders(workload: Workload, comm: Communicator) -> Iterator[Contender]:
    """Make all contenders, with a model each. All ranks must call; torch's default process group must be there.

    `alone` and `no_communication` are one module used by different sets of ranks. torch's DDP comes in its plausible
    settings (gradients as views of buckets always; buckets of 25 and 5 MiB, static graph or not): the best counts.
    """
    bare = workload.build()
    # Nothing is sent, and nobody waits: a traffic that stays at zero.
    yield Contender("alone", "", bare, bare, Traffic())
    yield Contender("no_communication", "", bare, bare, Traffic())
    module = workload.build()
    yield Contender("allreduce_sgd", "", module, DistributedDataParallel(module, comm), comm.traffic)
    for bucket_mb in _TORCH_BUCKETS_MB:
        for static_graph in (False, True):
            module = workload.build()
            replica = nn.parallel.DistributedDataParallel(
                module, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True, static_graph=static_graph
            )
            setting = f"bucket_cap_mb={bucket_mb}" + (" static_graph" if static_graph else "")
            yield Contender("torch_ddp_gloo", setting, module, replica, None)


def reference(workload: Workload, ranks: int) -> Reference:
    """Take one serial step with the mini-batches of all ranks."""
    module = workload.build()
    parameters = list(module.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    batches = [workload.batch(rank) for rank in range(ranks)]
    outputs = module(torch.cat([inputs for inputs, _ in batches]))
    functional.cross_entropy(outputs, torch.cat([labels for _, labels in batches])).backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    _sgd(parameters).step()
    return Reference(start, gradients, [parameter.detach() for parameter in parameters])


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=_LEARNING_RATE, momentum=_MOMENTUM)
