"""Buckets: gradients of one dtype and device side by side in one buffer, reduced by one all-reduce.

Gradients become ready roughly in reverse order of the parameters, so buckets are filled in that order, the first one
smaller so that the first reduction starts early (sizes as in PyTorch DDP: Li et al., VLDB 2020, arXiv 2006.15704).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator

__all__ = ["Bucket", "assign", "build_buckets"]


@dataclass
class Bucket:
    """One buffer and the parameters whose gradients lie in it.

    `slots[i]` views the part of `buffer` that holds the gradient of `parameters[i]`, in that parameter's shape and
    strides. `waiting_for` counts the gradients still to come in this backward pass.
    """

    parameters: list[nn.Parameter]
    buffer: Tensor
    slots: list[Tensor] = field(init=False)
    waiting_for: int = field(init=False)

    def __post_init__(self) -> None:
        self.waiting_for = len(self.parameters)
        self.slots = []
        start = 0
        for parameter in self.parameters:
            self.slots.append(_slot(self.buffer, start, parameter))
            start += parameter.numel()


def assign(parameters: Sequence[Tensor], first_bytes: float, bucket_bytes: float) -> list[list[int]]:
    """Return the indices of the parameters in each bucket, in the order in which buckets are expected to fill.

    A bucket takes parameters of one dtype and device, in reverse order, until it holds at least `bucket_bytes` (the
    first bucket of each dtype and device: `first_bytes`).
    """
    open_buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    open_bytes: dict[tuple[torch.dtype, torch.device], int] = {}
    limits: dict[tuple[torch.dtype, torch.device], float] = {}
    closed: list[list[int]] = []
    for index in reversed(range(len(parameters))):
        parameter = parameters[index]
        kind = (parameter.dtype, parameter.device)
        open_buckets.setdefault(kind, []).append(index)
        open_bytes[kind] = open_bytes.get(kind, 0) + parameter.numel() * parameter.element_size()
        if open_bytes[kind] >= limits.setdefault(kind, min(first_bytes, bucket_bytes)):
            closed.append(open_buckets.pop(kind))
            open_bytes[kind], limits[kind] = 0, bucket_bytes
    closed += open_buckets.values()
    return sorted(closed, key=lambda indices: -indices[-1])


def build_buckets(
    parameters: Sequence[nn.Parameter], comm: Communicator, first_bytes: float, bucket_bytes: float
) -> list[Bucket]:
    """Allocate the buckets of `parameters`. All ranks must call, with parameters of the same shapes and dtypes."""
    buckets = []
    for indices in assign(parameters, first_bytes, bucket_bytes):
        members = [parameters[index] for index in indices]
        numel = sum(parameter.numel() for parameter in members)
        buckets.append(Bucket(members, comm.allocate(numel, members[0].dtype, members[0].device)))
    return buckets


def _slot(buffer: Tensor, start: int, parameter: nn.Parameter) -> Tensor:
    piece = buffer[start : start + parameter.numel()]
    if parameter.is_contiguous() or not _is_dense(parameter):
        return piece.view(parameter.shape)
    return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill one block without gaps or overlaps, in whatever order (channels_last does)."""
    dimensions = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, length in dimensions:
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
