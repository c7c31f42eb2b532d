"""Horovod behind our protocol, where the `horovod` package is installed with PyTorch and MPI.

Horovod (Sergeev and Del Balso, arXiv:1802.05799): a thread of its own agrees with the other ranks, every
HOROVOD_CYCLE_TIME ms, on the operations that all ranks have submitted, fuses small ones, and runs them through NCCL or
MPI. An operation therefore takes a millisecond at least. It is known by its name: names here count up in the order of
the calls, which is the same on all ranks, and return after a while, since Horovod remembers a limited number of them.

What Horovod lacks: bool, bfloat16 and integers below 32 bits are reduced in a wider copy, complex numbers as pairs
and without a product; there are no messages between two ranks; only all ranks of the job together can make groups,
which live until Horovod ends. Fusion puts elements at other places from run to run, so sums of three and more ranks
may differ in their last bits. Horovod does not show what it sends, so `traffic.bytes_sent` is None; `busy_seconds`
runs from the start of an operation to the wait that sees its end.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from allreduce_sgd.comm.base import FinishedWork, ReduceOp, Traffic, Work, check_buffer, check_reduction
from allreduce_sgd.comm.polled import PolledWork
from allreduce_sgd.errors import CommunicationError, ConfigError, write_line
from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.topology import Topology

__all__ = ["HorovodCommunicator", "connect"]

_REDUCED_AS = {
    **{dtype: dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32)},
    torch.bfloat16: torch.float32,
    **dict.fromkeys((torch.int16, torch.int8, torch.uint8, torch.bool), torch.int32),
}
# Horovod's cache of agreed operations holds 1024; with more names than that it warns and agrees on each anew.
_NAMES = 256
# Horovod hands counts to MPI as C integers and does not check them.
_LARGEST_COUNT = 2**31 - 1


@dataclass
class _Job:
    """What all communicators of a job share: Horovod, and its process sets by their sorted ranks."""

    horovod: Any
    topology: Topology
    started_here: bool
    process_sets: dict[tuple[int, ...], Any] = field(default_factory=dict)
    communicators: int = 0


def connect(topology: Topology, device: torch.device, timeout_seconds: float) -> "HorovodCommunicator":
    """Make the communicator of all ranks; `device` is where this rank's gradients are. All ranks must call.

    Horovod is initialised on MPI's world communicator unless the caller has initialised it; where it was built without
    MPI, by what its own launcher left in the environment. Raises ConfigError where Horovod is not installed, cannot
    serve the device or sees other ranks than MPI. A job has one such communicator at a time, since Horovod is one for
    the whole process; others come from `split`.
    """
    horovod = topology.agree(lambda: _load(device))
    started_here = not horovod.is_initialized()
    if started_here:
        over_mpi = horovod.mpi_built() and topology.world is not None
        with topology.mpi_lock:
            horovod.init(comm=topology.world if over_mpi else None, process_sets="dynamic")
    topology.agree(lambda: _check(horovod, topology))
    job = _Job(horovod, topology, started_here)
    return HorovodCommunicator(job, horovod.global_process_set, list(range(topology.size)), timeout_seconds)


def _load(device: torch.device) -> Any:
    try:
        import horovod.torch as horovod
    except (ImportError, OSError) as problem:
        why = " ".join(str(problem).split())
        raise ConfigError(
            f"--backend horovod: horovod.torch cannot be imported ({why}); build it with "
            f"HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1, or choose mpi, nccl or gloo"
        ) from problem
    if device.type == "cuda" and not (horovod.cuda_built() or horovod.rocm_built()):
        raise ConfigError(
            f"--backend horovod: this Horovod was built without GPU support and cannot serve --device {device}; "
            f"install it with HOROVOD_GPU_OPERATIONS=NCCL, or choose nccl or mpi"
        )
    return horovod


def _check(horovod: Any, topology: Topology) -> None:
    seen = horovod.rank(), horovod.size()
    if seen != (topology.rank, topology.size):
        advice = "start with mpirun or horovodrun --mpi"
        if not horovod.mpi_built():
            advice = "this Horovod was built without MPI; install it with HOROVOD_WITH_MPI=1"
        raise ConfigError(
            f"--backend horovod: Horovod takes this process for rank {seen[0]} of {seen[1]}, MPI for rank "
            f"{topology.rank} of {topology.size}; {advice}"
        )
    if topology.world is not None and horovod.mpi_enabled() and not horovod.mpi_threads_supported():
        raise ConfigError("--backend horovod: MPI was initialised without MPI_THREAD_MULTIPLE, which Horovod needs")


class HorovodCommunicator:
    """A communicator over a Horovod process set. `members` are its ranks of the job, in the order of our ranks."""

    backend = "horovod"
    algorithm = None
    algorithm_table = None

    def __init__(self, job: _Job, process_set: Any, members: list[int], timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.traffic = Traffic(counts_bytes=False)
        self.rank = members.index(job.topology.rank)
        self.size = len(members)
        self._job = job
        self._process_set = process_set
        self._members = members
        # Horovod orders the ranks of a process set by their rank in the job, whatever the key of the split.
        self._sorted = sorted(range(self.size), key=members.__getitem__)
        self._prefix = f"allreduce_sgd.{job.communicators}"
        self._count = 0
        self._in_flight: dict[str, PolledWork] = {}
        self._is_world = job.communicators == 0
        self._open = True
        job.communicators += 1

    def describe_algorithm(self, n_bytes: int) -> None:
        return None

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def allocate_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        return None

    def all_reduce(
        self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM, *, shared_result: bool = False, blocking: bool = False
    ) -> Work:
        work = self._reduce("all_reduce", buffer, op, self._job.horovod.allreduce_async_, slice(None))
        if blocking:
            work.wait()
        return work

    def reduce_scatter(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        horovod = self._job.horovod
        own = chunk(buffer.numel(), self.size, self.rank)
        in_order = self._sorted == list(range(self.size))
        additive = op in (ReduceOp.SUM, ReduceOp.AVERAGE) and buffer.dtype is not torch.bool
        if in_order and additive and hasattr(horovod, "reducescatter_async"):
            # It cuts the first dimension as `chunk` does.
            return self._reduce("reduce_scatter", buffer, op, horovod.reducescatter_async, own)
        # An all-reduce leaves the same chunk, and the rest is undefined.
        return self._reduce("reduce_scatter", buffer, op, horovod.allreduce_async_, slice(None))

    def all_gather(self, buffer: Tensor) -> Work:
        data = self._admit(buffer, "all_gather")
        if self._nothing_to_do(data):
            return FinishedWork(data)
        flat, width = _bytes_of(data, "all_gather"), data.element_size()
        pieces = [chunk(data.numel(), self.size, index) for index in range(self.size)]
        views = [flat[piece.start * width : piece.stop * width] for piece in pieces]
        own = views[self.rank]

        def start(name: str) -> int:
            return self._job.horovod.allgather_async(own, name=name, process_set=self._process_set)

        def finish(result: Tensor) -> None:
            arrived = result.split([views[index].numel() for index in self._sorted])
            for index, piece in zip(self._sorted, arrived, strict=True):
                views[index].copy_(piece)

        return self._start("all_gather", data, start, finish)

    def broadcast(self, buffer: Tensor, root: int = 0) -> Work:
        if not 0 <= root < self.size:
            raise ValueError(f"broadcast: root: rank {root} is outside 0..{self.size - 1}")
        data = self._admit(buffer, "broadcast")
        if self._nothing_to_do(data):
            return FinishedWork(data)
        flat = _bytes_of(data, "broadcast")

        def start(name: str) -> int:
            return self._job.horovod.broadcast_async_(
                flat, self._members[root], name=name, process_set=self._process_set
            )

        return self._start("broadcast", data, start)

    def barrier(self) -> Work:
        # Horovod's own barrier blocks without a deadline.
        return self._reduce("barrier", torch.zeros(1), ReduceOp.SUM, self._job.horovod.allreduce_async_, slice(None))

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> Work:
        raise CommunicationError("send: Horovod has no messages between two ranks; choose --backend mpi, gloo or nccl")

    def receive(self, buffer: Tensor, source: int | None = None, tag: int = 0) -> Work:
        raise CommunicationError(
            "receive: Horovod has no messages between two ranks; choose --backend mpi, gloo or nccl"
        )

    def split(self, color: int, key: int = 0) -> "HorovodCommunicator":
        world = self._job.topology.size
        if self.size < world:
            raise CommunicationError(
                f"split: Horovod makes groups only with all {world} ranks of the job, and this communicator has "
                f"{self.size}; split that of all ranks, or choose --backend mpi, gloo or nccl"
            )
        mine = torch.zeros(self.size, 3, dtype=torch.int64)
        mine[self.rank] = torch.tensor([color, key, self._members[self.rank]])
        table = self.all_reduce(mine).wait().tolist()
        own: list[int] = []
        for each in sorted({row[0] for row in table}):
            rows = sorted((row for row in table if row[0] == each), key=lambda row: row[1])
            members = [row[2] for row in rows]
            # Also the parts of others: adding a process set takes every rank of the job, in the same order.
            self._add_process_set(members)
            if each == color:
                own = members
        return HorovodCommunicator(self._job, self._add_process_set(own), own, self.timeout_seconds)

    def abort(self, why: str) -> NoReturn:
        write_line(f"rank {self.rank} of {self.size}: {why}", sys.stderr)
        self._job.topology.abort(1)

    def close(self) -> None:
        if not self._open:
            return
        self.barrier().wait()
        for work in list(self._in_flight.values()):
            work.wait()
        self._open = False
        if self._is_world and self._job.started_here:
            self._job.horovod.shutdown()

    def _add_process_set(self, members: list[int]) -> Any:
        """Return the process set of these ranks, made with all ranks of the job where there is none yet."""
        ranks = tuple(sorted(members))
        if len(ranks) == 1:
            return None
        if len(ranks) == self._job.topology.size:
            return self._job.horovod.global_process_set
        if ranks not in self._job.process_sets:
            try:
                self._job.process_sets[ranks] = self._job.horovod.add_process_set(list(ranks))
            except ValueError as problem:
                raise CommunicationError(f"split: Horovod made no group of the ranks {ranks}: {problem}") from problem
        return self._job.process_sets[ranks]

    def _reduce(
        self, operation: str, buffer: Tensor, op: ReduceOp, function: Callable[..., int], written: slice
    ) -> Work:
        """Run a reduction of Horovod's that returns elements `written` of the flat buffer."""
        check_reduction(buffer, op, operation)
        data = self._admit(buffer, operation)
        if self._nothing_to_do(data):
            return FinishedWork(data)
        carried = _carried(data, op, operation)
        early = op is ReduceOp.AVERAGE and carried.dtype is torch.float16
        if early:
            # Half precision overflows at 65504: divided before, the sum of averages stays in range.
            carried.div_(self.size)
        horovod_op = getattr(self._job.horovod, _horovod_op(data, op))

        def finish(result: Tensor) -> None:
            if op is ReduceOp.AVERAGE and not early:
                result.div_(self.size)
            target = data.view(-1)[written]
            target = torch.view_as_real(target) if target.is_complex() else target
            if result.data_ptr() != target.data_ptr():
                target.copy_(result)

        return self._start(
            operation,
            data,
            lambda name: function(carried, name=name, op=horovod_op, process_set=self._process_set),
            finish,
        )

    def _admit(self, buffer: Tensor, operation: str) -> Tensor:
        if not self._open:
            raise CommunicationError("the communicator is closed")
        return check_buffer(buffer, operation)

    def _nothing_to_do(self, data: Tensor) -> bool:
        return self.size == 1 or data.numel() == 0

    def _start(
        self,
        operation: str,
        data: Tensor,
        start: Callable[[str], int],
        finish: Callable[[Tensor], None] | None = None,
    ) -> Work:
        horovod = self._job.horovod
        name = f"{self._prefix}.{self._count % _NAMES}"
        if name in self._in_flight:
            self._in_flight[name].wait()
        dtype = str(data.dtype).removeprefix("torch.")
        text = f"{operation} of {data.numel()} {dtype} (rank {self.rank} of {self.size})"
        try:
            handle = start(name)
        except (RuntimeError, ValueError) as problem:
            raise CommunicationError(f"{text} failed: {problem}") from problem
        self._count += 1

        def end() -> None:
            del self._in_flight[name]
            result = horovod.synchronize(handle)
            if finish is not None:
                finish(result)

        work = PolledWork(text, data, lambda: horovod.poll(handle), end, self.timeout_seconds, self.traffic)
        self._in_flight[name] = work
        return work


def _carried(data: Tensor, op: ReduceOp, operation: str) -> Tensor:
    """Return the data as Horovod reduces it, flat: a view of it, or a copy in a wider dtype.

    Complex numbers become pairs of real ones in a second dimension.
    """
    flat = data.view(-1)
    if data.is_complex():
        if op is ReduceOp.PRODUCT:
            raise ValueError(f"{operation}: horovod has no product of complex tensors")
        flat = torch.view_as_real(flat)
    if flat.dtype not in _REDUCED_AS:
        raise ValueError(f"{operation}: horovod cannot reduce tensors of {data.dtype}")
    _check_count(flat, operation)
    return flat.to(_REDUCED_AS[flat.dtype])


def _horovod_op(data: Tensor, op: ReduceOp) -> str:
    """Return Horovod's name of the operation that means `op` for what carries the data."""
    if data.dtype is torch.bool:
        return "Max" if op in (ReduceOp.SUM, ReduceOp.MAX) else "Min"
    return {ReduceOp.MIN: "Min", ReduceOp.MAX: "Max", ReduceOp.PRODUCT: "Product"}.get(op, "Sum")


def _bytes_of(data: Tensor, operation: str) -> Tensor:
    """View a contiguous tensor as bytes, so that every dtype travels."""
    flat = data.view(-1).view(torch.uint8)
    _check_count(flat, operation)
    return flat


def _check_count(flat: Tensor, operation: str) -> None:
    if flat.numel() > _LARGEST_COUNT:
        raise ValueError(
            f"{operation}: Horovod takes at most {_LARGEST_COUNT} elements of {flat.dtype} at once, not {flat.numel()}"
        )
