"""Our own collectives over MPI: schedules run by a progress engine on a duplicate of the caller's communicator.

MPI carries bytes only, so every dtype works, bfloat16 and float16 too, and torch does all arithmetic (MPI's own
reduction of bfloat16 was seen to be silently wrong). Messages are counted where they are handed to MPI. One thread at
a time calls MPI, under the topology's lock.

A tensor on a GPU is staged: copied to pinned host memory when the operation starts, and back in `wait`.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from mpi4py import MPI
from torch import Tensor

from allreduce_sgd.comm.base import FinishedWork, ReduceOp, Traffic, Work, check_buffer, check_reduction
from allreduce_sgd.comm.progress import Operation, Program, ProgressEngine
from allreduce_sgd.errors import CommunicationError
from allreduce_sgd.schedules import ring, tree
from allreduce_sgd.schedules.step import Schedule, Step

__all__ = ["MpiCommunicator"]

_ALL_REDUCE: dict[str, Schedule] = {"ring": ring.ring}

_COMBINE: dict[ReduceOp, Callable[[Tensor, Tensor], object]] = {
    ReduceOp.SUM: lambda into, other: into.add_(other),
    ReduceOp.AVERAGE: lambda into, other: into.add_(other),
    ReduceOp.MIN: lambda into, other: torch.minimum(into, other, out=into),
    ReduceOp.MAX: lambda into, other: torch.maximum(into, other, out=into),
    ReduceOp.PRODUCT: lambda into, other: into.mul_(other),
}


class MpiCommunicator:
    """A communicator over an mpi4py communicator, which stays the caller's.

    All ranks of `comm` must call the constructor. `engine` is shared by all communicators of a process, so that one
    progress thread and one lock serve them all.
    """

    backend = "mpi"

    def __init__(
        self, comm: Any, engine: ProgressEngine, algorithm: str = "auto", timeout_seconds: float = 300.0
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.traffic = Traffic()
        self.algorithm = "ring" if algorithm == "auto" else algorithm
        self._schedule = _ALL_REDUCE[self.algorithm]
        self._engine = engine
        with engine.lock:
            self._comm = comm.Dup()
            self._messages = comm.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self._channel: deque[Operation] | None = engine.open_channel()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def all_reduce(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        check_reduction(buffer, op, "all_reduce")
        return self._collective("all_reduce", buffer, self._schedule, op)

    def reduce_scatter(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        check_reduction(buffer, op, "reduce_scatter")
        return self._collective("reduce_scatter", buffer, ring.reduce_scatter, op)

    def all_gather(self, buffer: Tensor) -> Work:
        return self._collective("all_gather", buffer, ring.all_gather)

    def broadcast(self, buffer: Tensor, root: int = 0) -> Work:
        self._check_peer(root, "broadcast: root")

        def from_root(rank: int, size: int, length: int) -> Iterable[Step]:
            for step in tree.broadcast((rank - root) % size, size, length):
                send_to = None if step.send_to is None else (step.send_to + root) % size
                recv_from = None if step.recv_from is None else (step.recv_from + root) % size
                yield step._replace(send_to=send_to, recv_from=recv_from)

        return self._collective("broadcast", buffer, from_root)

    def barrier(self) -> Work:
        return self._start("barrier", torch.empty(0), self._barrier(), self._open_channel())

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> Work:
        self._check_peer(to, "send: to")
        host = check_buffer(buffer, "send").cpu()
        return self._start(f"send to rank {to} (tag {tag})", host, self._send(host, to, tag), None)

    def receive(self, buffer: Tensor, source: int | None = None, tag: int = 0) -> Work:
        if source is not None:
            self._check_peer(source, "receive: source")
        data = check_buffer(buffer, "receive")
        host = data if data.device.type == "cpu" else torch.empty_like(data, device="cpu")
        name = f"receive from {'any rank' if source is None else f'rank {source}'} (tag {tag})"
        work = self._start(name, host, self._receive(host, source, tag), None)
        return work if host is data else _StagedWork(work, data)

    def split(self, color: int, key: int = 0) -> "MpiCommunicator":
        # Peers may need steps of ours that are still queued, and a thread inside MPI_Comm_split takes none.
        self.barrier().wait()
        with self._engine.lock:
            part = self._comm.Split(color, key)
        try:
            return MpiCommunicator(part, self._engine, self.algorithm, self.timeout_seconds)
        finally:
            with self._engine.lock:
                part.Free()

    def abort(self, why: str) -> NoReturn:
        print(f"rank {self.rank} of {self.size}: {why}", file=sys.stderr, flush=True)
        self._comm.Abort(1)
        raise SystemExit(1)

    def close(self) -> None:
        if self._channel is None:
            return
        self.barrier().wait()
        self._engine.close_channel(self._channel)
        self._channel = None
        with self._engine.lock:
            self._comm.Free()
            self._messages.Free()

    def _open_channel(self) -> deque[Operation]:
        if self._channel is None:
            raise CommunicationError("the communicator is closed")
        return self._channel

    def _check_peer(self, rank: int, what: str) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{what}: rank {rank} is outside 0..{self.size - 1}")

    def _collective(
        self,
        operation: str,
        buffer: Tensor,
        schedule: Callable[[int, int, int], Iterable[Step]],
        op: ReduceOp | None = None,
    ) -> Work:
        data = check_buffer(buffer, operation)
        channel = self._open_channel()
        if self.size == 1:
            return FinishedWork(data)
        host = data if data.device.type == "cpu" else _pinned_copy(data)
        steps = schedule(self.rank, self.size, host.numel())
        name = (
            f"{operation} of {host.numel()} {str(host.dtype).removeprefix('torch.')} (rank {self.rank} of {self.size})"
        )
        work = self._start(name, host, self._execute(steps, host.view(-1), op), channel)
        return work if host is data else _StagedWork(work, data)

    def _start(self, name: str, buffer: Tensor, program: Program, channel: deque[Operation] | None) -> Operation:
        self._open_channel()
        operation = Operation(self._engine, program, buffer, name, self.timeout_seconds, self.traffic)
        self._engine.submit(operation, channel)
        return operation

    def _execute(self, steps: Iterable[Step], flat: Tensor, op: ReduceOp | None) -> Program:
        """Run a schedule on a flat CPU buffer."""
        item_bytes, address = flat.element_size(), flat.data_ptr()
        combine = None if op is None else _COMBINE[op]
        early = op is ReduceOp.AVERAGE and flat.dtype is torch.float16
        if early:
            # Half precision overflows at 65504: divided before, the sum of averages stays in range.
            flat.div_(self.size)
        moved = False
        for step in steps:
            requests = []
            scratch = None
            received = step.recv.stop - step.recv.start
            if step.recv_from is not None and received:
                if step.reduce:
                    scratch = self._scratch_for(received, flat.dtype)
                    target = scratch.data_ptr()
                else:
                    target = address + step.recv.start * item_bytes
                block = MPI.buffer.fromaddress(target, received * item_bytes)
                requests.append(self._comm.Irecv([block, MPI.BYTE], step.recv_from))
            sent_bytes = (step.send.stop - step.send.start) * item_bytes
            if step.send_to is not None and sent_bytes:
                block = MPI.buffer.fromaddress(address + step.send.start * item_bytes, sent_bytes)
                requests.append(self._comm.Isend([block, MPI.BYTE], step.send_to))
                self._count(sent_bytes)
            while not MPI.Request.Testall(requests):
                yield moved
                moved = False
            moved = True
            if scratch is not None:
                assert combine is not None
                combine(flat[step.recv], scratch)
        if op is ReduceOp.AVERAGE and not early:
            flat.div_(self.size)

    def _barrier(self) -> Program:
        request = self._comm.Ibarrier()
        while not request.Test():
            yield False

    def _send(self, data: Tensor, to: int, tag: int) -> Program:
        block = MPI.buffer.fromaddress(data.data_ptr(), data.nbytes)
        request = self._messages.Isend([block, MPI.BYTE], to, tag)
        self._count(data.nbytes)
        while not request.Test():
            yield False

    def _receive(self, data: Tensor, source: int | None, tag: int) -> Program:
        block = MPI.buffer.fromaddress(data.data_ptr(), data.nbytes)
        status = MPI.Status()
        request = self._messages.Irecv([block, MPI.BYTE], MPI.ANY_SOURCE if source is None else source, tag)
        while not request.Test(status):
            yield False
        arrived = status.Get_count(MPI.BYTE)
        if arrived != data.nbytes:
            raise CommunicationError(f"rank {status.Get_source()} sent {arrived} bytes, {data.nbytes} were expected")

    def _count(self, sent_bytes: int) -> None:
        assert self.traffic.bytes_sent is not None
        self.traffic.bytes_sent += sent_bytes

    def _scratch_for(self, numel: int, dtype: torch.dtype) -> Tensor:
        needed_bytes = numel * dtype.itemsize
        if self._scratch.numel() < needed_bytes:
            self._scratch = torch.empty(needed_bytes, dtype=torch.uint8)
        return self._scratch[:needed_bytes].view(dtype)


class _StagedWork:
    """The Work of a tensor on a GPU: its host copy is reduced, and copied back by the thread that waits."""

    def __init__(self, work: Work, device_buffer: Tensor) -> None:
        self._work = work
        self._device_buffer = device_buffer
        self._copied = False

    def wait(self, timeout: float | None = None) -> Tensor:
        host = self._work.wait(timeout)
        if not self._copied:
            self._device_buffer.copy_(host)
            self._copied = True
        return self._device_buffer

    def done(self) -> bool:
        return self._work.done()


def _pinned_copy(data: Tensor) -> Tensor:
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    return host.copy_(data)
