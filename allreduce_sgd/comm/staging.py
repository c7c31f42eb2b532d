"""A tensor on a GPU is reduced over MPI through host memory, in segments: copies and reductions overlap.

All copies out are queued when the operation starts, on a stream of their own that follows what the caller's stream has
written. As soon as segment k has arrived it is reduced, and its copy back is queued on another stream while segment
k + 1 is reduced. With S segments of t seconds each, a tensor takes copy out + reduce + copy in of S segments one after
the other without this, and max(copy out, reduce, copy in) of S segments + the other two of one segment with it.

Nothing here waits for the device: whoever advances the program asks whether an event has passed, so that the lock
around MPI is never held by a sleeping thread. The program ends when the device has seen the last copy, so kernels that
any thread queues on any stream afterwards read the result, and the memory may be freed.

Copies overlap with computing only if the host memory is pinned. `Copier.host_memory` takes it from torch's caching
host allocator: it keeps pinned blocks between calls, since pinning takes milliseconds, and hands one out again only
when the copies that use it are done.
"""

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from allreduce_sgd.comm.progress import Program

__all__ = ["Copier", "Copy", "CudaCopier", "mpi_takes_device_memory", "settle", "staged"]


class Copy(Protocol):
    """A queued copy."""

    def done(self) -> bool:
        """Say, without waiting, whether the copy has ended. Raises RuntimeError where the device failed."""


class Copier(Protocol):
    """Queues copies between a device and the host: those out and those in each in order, both beside each other."""

    def host_memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor of shape (numel,) on the host that copies reach at full speed."""

    def follow_caller(self) -> None:
        """Let copies out queued from now on begin after what the calling thread has queued on the device so far."""

    def copy_out(self, device: Tensor, host: Tensor) -> Copy:
        """Queue a copy from the device to the host."""

    def copy_in(self, host: Tensor, device: Tensor) -> Copy:
        """Queue a copy from the host to the device."""


class CudaCopier:
    """Copies on two side streams of one GPU, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)
        self._in = torch.cuda.Stream(device)

    def host_memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, pin_memory=True)

    def follow_caller(self) -> None:
        self._out.wait_stream(torch.cuda.current_stream(self._device))

    def copy_out(self, device: Tensor, host: Tensor) -> Copy:
        return _CudaCopy(self._out, device, host)

    def copy_in(self, host: Tensor, device: Tensor) -> Copy:
        return _CudaCopy(self._in, host, device)


class _CudaCopy:
    def __init__(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            self._event = stream.record_event()

    def done(self) -> bool:
        return self._event.query()


def staged(
    device_buffer: Tensor,
    host: Tensor,
    segment_numel: int,
    reduce: Callable[[Tensor], Program],
    copier: Copier,
) -> Program:
    """Queue the copies out of `device_buffer` and return the program that reduces it in place.

    `device_buffer` is contiguous, of n elements; `host` is a tensor of shape (n,) and the same dtype that belongs to
    the program until its end. `reduce` returns the program that reduces a segment of `host`, of `segment_numel`
    elements and what is left in the last, in place; it is called here for every segment, in order, and the programs
    run later. All ranks must give the same `segment_numel`. Only operations on each element by itself can be cut so
    (all-reduce, broadcast); one whose result depends on an element's place takes one segment. The calling thread's
    current stream is the one that has written the buffer. Where a reduction fails its error is raised once the copies
    that are under way have ended. Raises ValueError where the tensors do not match.
    """
    flat = device_buffer.view(-1)
    if host.shape != flat.shape or host.dtype != flat.dtype:
        raise ValueError(
            f"staged: {flat.numel()} {flat.dtype} elements cannot pass through host memory of shape "
            f"{tuple(host.shape)} and {host.dtype}"
        )
    if segment_numel < 1:
        raise ValueError(f"staged: segments of {segment_numel} elements; at least 1 is needed")
    starts = range(0, flat.numel(), segment_numel)
    segments = [slice(start, min(start + segment_numel, flat.numel())) for start in starts]
    copier.follow_caller()
    copies = [copier.copy_out(flat[segment], host[segment]) for segment in segments]
    # Made in the caller's thread, so in the order of the calls: a program may take its turn among others when made.
    reductions = [reduce(host[segment]) for segment in segments]
    return _reduced(flat, host, segments, copies, reductions, copier)


def _reduced(
    flat: Tensor,
    host: Tensor,
    segments: list[slice],
    copies_out: list[Copy],
    reductions: list[Program],
    copier: Copier,
) -> Program:
    copies_in: list[Copy] = []
    try:
        for segment, arrival, reduction in zip(segments, copies_out, reductions, strict=True):
            yield from _ended([arrival])
            yield from reduction
            copies_in.append(copier.copy_in(host[segment], flat[segment]))
            yield True
    except Exception:
        # The memory is freed with this program, and a copy would go on writing to it.
        yield from _ended([*copies_out, *copies_in])
        raise
    yield from _ended(copies_in)


def _ended(copies: Iterable[Copy]) -> Program:
    for copy in copies:
        while not copy.done():
            yield False


def settle(data: Tensor) -> None:
    """Wait until a GPU has done what this thread asked of it: MPI, and other threads, know nothing of its streams."""
    if data.is_cuda:
        torch.cuda.current_stream(data.device).synchronize()


def mpi_takes_device_memory(library: Any = None) -> bool:
    """Say whether MPI may be given pointers to GPU memory, as it answers `MPIX_Query_cuda_support()` itself.

    `library` is MPI's as ctypes loads it; None takes the one that mpi4py has loaded, which must be initialised. False
    where the library does not have the function.
    """
    if library is None:
        from mpi4py import MPI

        # Symbols are looked up in the extension module and what it is linked with: the MPI library in use, wherever.
        library = ctypes.CDLL(MPI.__file__)
    query = getattr(library, "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1
