"""The floor of an all-reduce on one node: every rank adds its n/P elements of all P buckets into one result, at once.

Nothing less can be done where ranks share memory and one result: (P+1)·n bytes are read and written in all, 3n at
P = 2, and no rank waits for another. The buckets and the result lie in shared memory, as large and as cold as those of
the contenders, and each rank has written its own bucket just before.

The memory is an anonymous file (Linux's memfd), which the other ranks open through /proc: it has no name that could
outlive the job.
"""

import contextlib
import mmap
import os

import torch
from torch import Tensor

from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.topology import Topology

__all__ = ["MemoryFloor"]

_PAGE_BYTES = mmap.PAGESIZE
# Where there are more than two inputs, the partial sum of a block stays in a core's cache.
_BLOCK_BYTES = 128 << 10


class MemoryFloor:
    """The shared buckets of one size, and the addition.

    All ranks of the node must call the constructor. Raises OSError, on all ranks, where the memory cannot be shared.
    """

    def __init__(self, topology: Topology, numel: int, dtype: torch.dtype) -> None:
        bucket_bytes = -(-numel * dtype.itemsize // _PAGE_BYTES) * _PAGE_BYTES
        shared = _share(topology, (topology.local_size + 1) * bucket_bytes)
        *buckets, self.result = (
            torch.frombuffer(shared, dtype=dtype, count=numel, offset=index * bucket_bytes)
            for index in range(topology.local_size + 1)
        )
        self.bucket = buckets[topology.local_rank]
        self.region = chunk(numel, topology.local_size, topology.local_rank)
        whole = self.region.stop - self.region.start
        block = whole if topology.local_size == 2 else torch.get_num_threads() * _BLOCK_BYTES // dtype.itemsize
        self._blocks = [
            tuple(part[start : min(start + block, self.region.stop)] for part in (self.result, *buckets))
            for start in range(self.region.start, self.region.stop, max(1, block))
        ]

    def add(self) -> Tensor:
        """Add this rank's share, and return the result, of which `region` is defined on this rank."""
        for result, first, second, *others in self._blocks:
            torch.add(first, second, out=result)
            for other in others:
                result.add_(other)
        return self.result


def _share(topology: Topology, length_bytes: int) -> mmap.mmap:
    """Return `length_bytes` of zeroed memory that all ranks of this one node share."""
    leader = topology.local_rank == 0
    descriptor: int | None = None
    mapped: mmap.mmap | None = None
    error: str | None = None
    with contextlib.suppress(OSError):
        if leader:
            descriptor = os.memfd_create("memory_floor")
            os.ftruncate(descriptor, length_bytes)
    path = topology.broadcast(None if descriptor is None else f"/proc/{os.getpid()}/fd/{descriptor}")
    try:
        if path is None:
            raise OSError("the first rank cannot make an anonymous file")
        if not leader:
            descriptor = os.open(path, os.O_RDWR)
        assert descriptor is not None
        mapped = mmap.mmap(descriptor, length_bytes)
    except OSError as problem:
        error = str(problem)
    errors = [text for text in topology.gather_all(error) if text is not None]
    # A mapping keeps the memory without the descriptor; the first rank's has to last until the others have mapped.
    if descriptor is not None:
        os.close(descriptor)
    if errors or mapped is None:
        raise OSError(errors[0])
    return mapped
