"""What our hooks cost per parameter: Python, and the call of torch that copies a gradient into its bucket.

A module of many tiny parameters, whose gradients all come from one operation, runs backward passes with and without
DistributedDataParallel, by turns. The difference, less the time in which the thread waits for other ranks, divided by
the number of parameters, is the cost. Of each the fastest round counts, as usual for what takes microseconds: whatever
else runs on the machine only adds. The mean over ranks.
"""

import time

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.gradients.ddp import DistributedDataParallel

__all__ = ["hook_seconds_per_parameter"]

_PARAMETERS = 1000
_ELEMENTS = 4
_ROUNDS = 30


class _ManyParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(_ELEMENTS) for _ in range(_PARAMETERS))

    def forward(self) -> Tensor:
        return torch.cat(list(self.parts)).sum()


def hook_seconds_per_parameter(comm: Communicator) -> float:
    """Return the cost in seconds. All ranks must call."""
    bare, module = _ManyParameters(), _ManyParameters()
    replica = DistributedDataParallel(module, comm)
    without, with_hooks = [], []
    for _ in range(_ROUNDS):
        without.append(_backward_seconds(bare, comm))
        comm.barrier().wait()
        with_hooks.append(_backward_seconds(replica, comm))
    everyone: list[float] = all_gather_object(comm, min(with_hooks) - min(without))
    return sum(everyone) / (comm.size * _PARAMETERS)


def _backward_seconds(module: nn.Module, comm: Communicator) -> float:
    """Return the seconds of one backward pass, without waiting for other ranks."""
    module.zero_grad()
    loss = module()
    waited = comm.traffic.waited_seconds
    start = time.perf_counter()
    loss.backward()
    return time.perf_counter() - start - (comm.traffic.waited_seconds - waited)
