"""Buckets: gradients of one dtype and device side by side in one buffer, reduced by one all-reduce.

Gradients become ready roughly in reverse order of the parameters, so buckets are filled in that order until the true
one is known, the first bucket smaller so that the first reduction starts early (sizes as in PyTorch DDP: Li et al.,
VLDB 2020, arXiv 2006.15704).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator

__all__ = ["SPACING", "Bucket", "BucketMemory", "Kind", "assign", "build_buckets", "kind_of", "spaced"]

Kind = tuple[torch.dtype, torch.device]

# Buckets start on a cache line, so that ranks that write neighbouring ones do not disturb each other.
_ALIGNED_BYTES = 64

# Where parameters are sharded they, and the shards of each, begin at multiples of this: kernels for vectors round other
# elements differently than the same kernels do in whole tensors, and are slower, where memory is not aligned as they
# like it.
SPACING = 64


@dataclass
class Bucket:
    """One flat buffer and the parameters whose gradients lie in it.

    `slots[i]` views the part of `buffer` that holds the gradient of `parameters[i]`, in that parameter's shape and
    strides; it begins at element `starts[i]`, a multiple of `spacing`. `buffer` may be longer than all of them.
    """

    parameters: list[nn.Parameter]
    buffer: Tensor
    spacing: int = 1
    slots: list[Tensor] = field(init=False)
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.slots, self.starts = [], []
        start = 0
        for parameter in self.parameters:
            self.slots.append(_slot(self.buffer, start, parameter))
            self.starts.append(start)
            start += spaced(parameter.numel(), self.spacing)


class BucketMemory:
    """The memory of a set of buckets: one allocation for each dtype and device, cut anew whenever buckets change."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._blocks: dict[Kind, Tensor] = {}

    def cut(self, pieces: Sequence[tuple[Kind, int]], spare: int = 0) -> list[Tensor]:
        """Return flat tensors of these kinds and lengths. All ranks must call, with the same arguments.

        Those returned before lie in the same memory. What is allocated has room for `spare` more elements, since other
        cuts of the same parameters may be rounded up more.
        """
        starts: list[int] = []
        ends: dict[Kind, int] = {}
        for kind, numel in pieces:
            aligned = max(1, _ALIGNED_BYTES // kind[0].itemsize)
            starts.append(ends.get(kind, 0))
            ends[kind] = starts[-1] + spaced(numel, aligned)
        for kind, numel in ends.items():
            if kind not in self._blocks or self._blocks[kind].numel() < numel:
                self._blocks[kind] = self._comm.allocate(numel + spare, *kind)
        return [self._blocks[kind][start : start + numel] for (kind, numel), start in zip(pieces, starts, strict=True)]


def spaced(numel: int, spacing: int) -> int:
    """Return the least multiple of `spacing` that is not below `numel`."""
    return -(-numel // spacing) * spacing


def kind_of(tensor: Tensor) -> Kind:
    return tensor.dtype, tensor.device


def assign(
    parameters: Sequence[Tensor],
    first_bytes: float,
    bucket_bytes: float,
    order: Sequence[int] | None = None,
    kind: Callable[[Tensor], Kind] = kind_of,
) -> list[list[int]]:
    """Return the indices of the parameters in each bucket, in the order in which buckets are expected to fill.

    A bucket takes parameters of one kind, in the order in which gradients become ready (None: in reverse), until it
    holds at least `bucket_bytes` (the first bucket of each kind: `first_bytes`).
    """
    order = list(reversed(range(len(parameters)))) if order is None else order
    place = {index: position for position, index in enumerate(order)}
    open_buckets: dict[Kind, list[int]] = {}
    open_bytes: dict[Kind, int] = {}
    limits: dict[Kind, float] = {}
    closed: list[list[int]] = []
    for index in order:
        which = kind(parameters[index])
        open_buckets.setdefault(which, []).append(index)
        open_bytes[which] = open_bytes.get(which, 0) + parameters[index].numel() * which[0].itemsize
        if open_bytes[which] >= limits.setdefault(which, min(first_bytes, bucket_bytes)):
            closed.append(open_buckets.pop(which))
            open_bytes[which], limits[which] = 0, bucket_bytes
    closed += open_buckets.values()
    return sorted(closed, key=lambda indices: place[indices[-1]])


def build_buckets(
    parameters: Sequence[nn.Parameter], comm: Communicator, first_bytes: float, bucket_bytes: float, spacing: int = 1
) -> list[Bucket]:
    """Allocate the buckets of `parameters`, whose slots begin at multiples of `spacing` elements.

    All ranks must call, with parameters of the same shapes and dtypes.
    """
    groups = [[parameters[index] for index in indices] for indices in assign(parameters, first_bytes, bucket_bytes)]
    lengths = [(kind_of(members[0]), sum(spaced(one.numel(), spacing) for one in members)) for members in groups]
    buffers = BucketMemory(comm).cut(lengths)
    return [Bucket(members, buffer, spacing) for members, buffer in zip(groups, buffers, strict=True)]


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
