"""Memory that all ranks of one node have mapped: where gradient buckets live, so that ranks reduce out of each other's.

The memory is an anonymous file of the kernel (memfd_create), opened by the other ranks through /proc/PID/fd of the one
that made it. It never has a name in /dev/shm, so nothing can stay there, not even after kill -9: the kernel frees it
with the last process that maps it. Its pages count as the node's memory, which is checked before; a limit of /dev/shm's
size does not apply.

Where the ranks of a node cannot open each other's files (one container per rank, no /proc, not Linux), there is no
shared memory, and collectives go through MPI alone.
"""

import contextlib
import mmap
import os
import secrets
import threading
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from allreduce_sgd.comm.semaphores import NodeBarrier, barrier_bytes, create_semaphores
from allreduce_sgd.errors import CommunicationTimeout, MemoryNotSharedError

__all__ = ["NOTE_NUMBERS", "SharedMemory", "Views"]

_NUMBER_BYTES = 8
# Two cache lines.
NOTE_NUMBERS = 16
_POLL_SECONDS = 0.00005
_VIEWS_KEPT = 4096


@dataclass(frozen=True)
class Views:
    """One piece of memory in the buffers of all ranks of the node: flat tensors of one length and dtype.

    `buffers[r]` belongs to local rank r; `result` is the piece that all of them share. `place` is the same number on
    all ranks for the same piece.
    """

    buffers: list[Tensor]
    result: Tensor
    place: int


class _Segment:
    """One allocation: a buffer for each rank and a shared result, one after another, each starting on a page."""

    def __init__(self, memory: Tensor, stride_bytes: int, local_rank: int, local_size: int) -> None:
        starts = [index * stride_bytes for index in range(local_size + 1)]
        self.buffers = [memory[start : start + stride_bytes] for start in starts]
        self.start = self.buffers[local_rank].data_ptr()
        self.stop = self.start + stride_bytes


class SharedMemory:
    """What the ranks of a node share; `node` is their mpi4py communicator, which stays the caller's.

    All ranks of the node must make it, and call `allocate`, together. Raises MemoryNotSharedError on all of them where
    they cannot share memory.

    `barrier` lets the ranks meet. `notes` are integers of 64 bits without sign, NOTE_NUMBERS for each rank (the first
    local rank's come first), that all of them read and write: with a barrier between the one and the other they are
    sure to see it. `staging(slot)` gives the ranks' slots, for data that does not lie in shared memory.
    """

    def __init__(
        self,
        node: Any,
        lock: threading.Lock,
        timeout_seconds: float,
        spin: bool,
        slot_bytes: int,
        slots: int,
    ) -> None:
        self.local_rank: int = node.Get_rank()
        self.local_size: int = node.Get_size()
        self._node = node
        self.slot_bytes = slot_bytes
        self._lock = lock
        self._timeout_seconds = timeout_seconds
        self._segments: list[_Segment] = []
        self._views: dict[tuple[int, int, torch.dtype], Views] = {}
        self._staging: dict[tuple[int, int, torch.dtype], Views] = {}
        semaphores_bytes = barrier_bytes(self.local_size)
        notes_bytes = self.local_size * NOTE_NUMBERS * _NUMBER_BYTES
        self._slots_start = -(-(semaphores_bytes + notes_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        stride_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        per_slot = (self.local_size + 1) * stride_bytes
        memory = self._map(self._slots_start + slots * per_slot)
        numbers = memory[semaphores_bytes : semaphores_bytes + notes_bytes].numpy()
        self.notes = memoryview(numbers).cast("Q")  # type: ignore[arg-type]  # arrays are buffers
        starts = [self._slots_start + slot * per_slot for slot in range(slots)]
        self._slots = [
            _Segment(memory[start : start + per_slot], stride_bytes, self.local_rank, self.local_size)
            for start in starts
        ]
        if self.local_rank == 0:
            create_semaphores(memory, self.local_size)
        self._exchange([0])
        self.barrier = NodeBarrier(memory, self.local_rank, self.local_size, spin)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return this rank's zeroed buffer of shape (numel,). All ranks of the node must call, with the same arguments.

        Raises MemoryNotSharedError on all of them where the node has not enough memory for all of it.
        """
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        stride_bytes = -(-numel * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = self._map((self.local_size + 1) * stride_bytes)
        segment = _Segment(memory, stride_bytes, self.local_rank, self.local_size)
        self._segments.append(segment)
        own = segment.buffers[self.local_rank][: numel * dtype.itemsize].view(dtype)
        # Touched by the rank that will write it, so that the pages come from memory near its core, and come now.
        return own.zero_()

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return zeroed memory of shape (numel,) that is the same for all ranks of the node. All of them must call."""
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        n_bytes = numel * dtype.itemsize
        return self._map(-(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)[:n_bytes].view(dtype)

    def find(self, data: Tensor) -> Views | None:
        """Return the flat views of all ranks' counterparts of `data`, None where it lies in private memory."""
        key = (data.data_ptr(), data.numel(), data.dtype)
        known = self._views.get(key)
        if known is None:
            for index, segment in enumerate(self._segments):
                if segment.start <= key[0] and key[0] + data.nbytes <= segment.stop:
                    if len(self._views) >= _VIEWS_KEPT:
                        self._views.clear()
                    offset = key[0] - segment.start
                    known = self._views[key] = _views(segment, offset, data.nbytes, data.dtype, index)
                    break
        return known

    def staging(self, slot: int, numel: int, dtype: torch.dtype) -> Views:
        """Return the first `numel` elements of the slot of every rank."""
        key = (slot, numel, dtype)
        known = self._staging.get(key)
        if known is None:
            if len(self._staging) >= _VIEWS_KEPT:
                self._staging.clear()
            known = self._staging[key] = _views(self._slots[slot], 0, numel * dtype.itemsize, dtype, 0)
        return known

    def close(self) -> None:
        """Let go of all memory; tensors that still view it keep theirs mapped."""
        self._segments.clear()
        self._views.clear()
        self._slots.clear()
        self._staging.clear()
        self.notes = memoryview(b"")

    def _map(self, n_bytes: int) -> Tensor:
        """Map new memory on all ranks of the node. All of them must call, with the same number."""
        token = free_bytes = 0
        descriptor = -1
        if self.local_rank == 0:
            free_bytes = _free_bytes()
            if n_bytes <= free_bytes:
                with contextlib.suppress(OSError, AttributeError):
                    token = secrets.randbits(62) | 1
                    descriptor = os.memfd_create(_file_name(token))
                    os.ftruncate(descriptor, n_bytes)
        try:
            (token, process, number, free_bytes), *_ = self._exchange([token, os.getpid(), descriptor, free_bytes])
            if n_bytes > free_bytes:
                raise MemoryNotSharedError(
                    f"allocate: {n_bytes:,} bytes of shared memory are needed, but {free_bytes:,} are free on this node"
                )
            mapped: Tensor | None = None
            # RuntimeError is what torch raises where it cannot map.
            with contextlib.suppress(OSError, RuntimeError):
                mapped = _open_file(process, number, token, n_bytes)
            failed = [rank for rank, (good,) in enumerate(self._exchange([mapped is not None])) if not good]
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if failed or mapped is None:
            raise MemoryNotSharedError(
                f"allocate: local rank {failed[0]} cannot map memory that local rank 0 made, through "
                f"/proc/{process}/fd (has each rank of this node a container of its own?)"
            )
        return mapped

    def _exchange(self, numbers: list[int]) -> list[tuple[int, ...]]:
        """Return the numbers of all ranks of the node."""
        everyone = array("q", [0] * (len(numbers) * self.local_size))
        with self._lock:
            request = self._node.Iallgather(array("q", numbers), everyone)
        deadline_seconds = time.monotonic() + self._timeout_seconds
        while True:
            with self._lock:
                if request.Test():
                    break
            if time.monotonic() > deadline_seconds:
                raise CommunicationTimeout(
                    f"the ranks of this node did not come to share memory within {self._timeout_seconds:g} s"
                )
            time.sleep(_POLL_SECONDS)
        width = len(numbers)
        return [tuple(everyone[start : start + width]) for start in range(0, len(everyone), width)]


def _views(segment: _Segment, offset: int, n_bytes: int, dtype: torch.dtype, index: int) -> Views:
    pieces = [buffer[offset : offset + n_bytes].view(dtype) for buffer in segment.buffers]
    return Views(pieces[:-1], pieces[-1], (index << 48) + offset)


def _file_name(token: int) -> str:
    return f"allreduce_sgd-{token:x}"


def _open_file(process: int, number: int, token: int, n_bytes: int) -> Tensor | None:
    """Map the file that process `process` has open under `number`; None where that is another one."""
    path = f"/proc/{process}/fd/{number}"
    # In a container of its own a rank sees other processes under the same numbers.
    if _file_name(token) not in os.readlink(path):
        return None
    # Unlike mmap.mmap, which keeps a descriptor for every mapping, of which a process has some thousand.
    storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=n_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]  # it is an UntypedStorage


def _free_bytes() -> int:
    """Return how much more memory this node has, within the limit of the control group this process runs in."""
    free_bytes = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):
        # Files in the page cache count as used, but give way.
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used_bytes = int((group / "memory.current").read_text()) - int(pages["inactive_file"])
        free_bytes = min(free_bytes, int((group / "memory.max").read_text()) - used_bytes)
    return max(0, free_bytes)
