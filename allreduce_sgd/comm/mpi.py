"""Our own collectives over MPI: schedules run by a progress engine on a duplicate of the caller's communicator.

MPI carries bytes only, so every dtype works, bfloat16 and float16 too, and torch does all arithmetic (MPI's own
reduction of bfloat16 was seen to be silently wrong). Messages are counted where they are handed to MPI, and what goes
through the memory that the ranks of a node share where it is read from or written to a peer's. One thread at a time
calls MPI, under the topology's lock.

How an all-reduce of a certain size is done says a table (`choice.py`): through shared memory inside the node and a
schedule between nodes (`node.py`), by a schedule over all ranks (`execute.py`), or by MPI's own all-reduce, for small
messages of dtypes that MPI knows (`library.py`).

Every collective has a number and a stamp (`ledger.py`) that keep different ones apart, and ranks that differ are named
(`desync.py`).

A tensor on a GPU is staged through pinned host memory in segments (`staging.py`), unless MPI is CUDA-aware: then it is
handed the device's memory, and schedules over all ranks do the reduction there.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn, cast

import torch
from mpi4py import MPI
from torch import Tensor

from allreduce_sgd.comm.base import AlgorithmTable, FinishedWork, ReduceOp, Traffic, Work, check_buffer, check_reduction
from allreduce_sgd.comm.choice import LIBRARY, SHARED_MEMORY, TWO_LEVEL, Choice, Entry
from allreduce_sgd.comm.desync import Watch
from allreduce_sgd.comm.execute import Execution, Scratch, first_tag
from allreduce_sgd.comm.layout import Layout
from allreduce_sgd.comm.ledger import Ledger
from allreduce_sgd.comm.library import library_all_reduce, library_can
from allreduce_sgd.comm.messages import receive, send
from allreduce_sgd.comm.node import NodeAllReduce
from allreduce_sgd.comm.progress import Channel, Operation, Program, ProgressEngine
from allreduce_sgd.comm.reduction import accumulator_dtype, finish
from allreduce_sgd.comm.staging import CudaCopier, mpi_takes_device_memory, settle, staged
from allreduce_sgd.errors import CommunicationError, write_line
from allreduce_sgd.schedules import ring, tree
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.recursive_doubling import recursive_doubling
from allreduce_sgd.schedules.step import Schedule, Step

__all__ = ["MpiCommunicator"]

CPU = torch.device("cpu")
_STAGING_BYTES = 4 * 2**20
# Two steps, so that receives are posted before their messages come; more where a step is only a segment.
_LOOK_AHEAD = 2
_LOOK_AHEAD_SEGMENTS = 4
# Between nodes long messages that meet often go one way after the other, at half the rate; several of this length at
# once fill a link both ways (1 Gbit/s TCP, MPICH and Open MPI; see benchmarks/README.md).
_LONGEST_BYTES_BETWEEN = 512 * 1024


class MpiCommunicator:
    """A communicator over an mpi4py communicator, which stays the caller's.

    All ranks of `comm` must call the constructor, with the same arguments. `engine` is shared by all communicators of a
    process, so that one progress thread and one lock serve them all. `choice` says which algorithm serves which size;
    it may be replaced, on all ranks at once, while nothing is under way. `node_color` overrides what MPI says about
    who shares memory: ranks of one color make a node.
    """

    backend = "mpi"

    def __init__(
        self,
        comm: Any,
        engine: ProgressEngine,
        choice: Callable[[Layout], Choice],
        timeout_seconds: float = 300.0,
        node_color: int | None = None,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.traffic = Traffic()
        self._engine = engine
        self._choose = choice
        with engine.lock:
            self._comm = comm.Dup()
            self._messages = comm.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.layout = Layout(self._comm, engine.lock, timeout_seconds, not engine.oversubscribed, node_color)
        self.choice = choice(self.layout)
        self._ledger = Ledger()
        self._largest_tag = cast(int, MPI.COMM_WORLD.Get_attr(MPI.TAG_UB))
        self._watch = Watch(self._comm, self._largest_tag, self._ledger, timeout_seconds)
        self._channel: Channel | None = engine.open_channel(
            None if self.layout.nodes == 1 else self._comm.Iprobe, None if self.size == 1 else self._watch
        )
        self._scratch = {CPU: Scratch(CPU)}
        self._nothing = torch.empty(0)
        self._copiers: dict[torch.device, CudaCopier] = {}
        self._device_memory = mpi_takes_device_memory()
        self._node: NodeAllReduce | None = None
        if self.layout.memory is not None:
            between = None if self.layout.nodes == 1 else self._between
            self._node = NodeAllReduce(
                self.layout.memory, between, self.layout.lanes, self.size, self.traffic.sent, self._watch.inquire
            )

    @property
    def algorithm(self) -> str:
        return self.choice.name

    @property
    def algorithm_table(self) -> AlgorithmTable:
        return self.choice.to_lists()

    def describe_algorithm(self, n_bytes: int) -> str:
        entry = self.choice.for_message(n_bytes)
        if entry.algorithm != TWO_LEVEL or self.layout.nodes == 1:
            return entry.describe()
        return f"{entry.describe()}, {self.choice.for_between(n_bytes // self.layout.lanes).describe()} between nodes"

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu" or self.layout.memory is None:
            return torch.zeros(numel, dtype=dtype, device=device)
        self._meet("allocate", numel, dtype).wait()
        return self.layout.memory.allocate(numel, dtype)

    def allocate_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if device.type != "cpu" or self.layout.memory is None or self.layout.nodes > 1:
            return None
        self._meet("allocate_shared", numel, dtype).wait()
        return self.layout.memory.allocate_shared(numel, dtype)

    def all_reduce(
        self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM, *, shared_result: bool = False, blocking: bool = False
    ) -> Work:
        self._open_channel()
        buffer = check_buffer(buffer, "all_reduce")
        check_reduction(buffer, op, "all_reduce")
        entry = self.choice.for_message(buffer.nbytes)
        if entry.algorithm == LIBRARY and not library_can(buffer, op):
            entry = Entry(None, "recursive-doubling" if self._node is None else TWO_LEVEL)
        if buffer.is_cuda and self._device_memory and entry.algorithm in (SHARED_MEMORY, TWO_LEVEL):
            entry = self.choice.for_between(buffer.nbytes)
        how = entry.algorithm
        if entry.algorithm == LIBRARY:
            program = partial(self._library, op=op)
        elif entry.algorithm in (SHARED_MEMORY, TWO_LEVEL):
            assert self._node is not None
            program = partial(self._node.all_reduce, op=op, shared_result=shared_result)
            how = f"{how}, one result" if shared_result else how
        else:
            program = partial(self._flat, schedule=_schedule(entry, buffer), op=op, look_ahead=_depth(entry))
        return self._collective("all_reduce", buffer, program, op, how, blocking, _STAGING_BYTES)

    def run(self, buffer: Tensor, schedule: Schedule, op: ReduceOp | None = None, *, blocking: bool = False) -> Work:
        """Run a schedule of one's own over all ranks, on the flat buffer, in place. All ranks must call.

        `op` combines what arrives in steps that reduce; AVERAGE divides by the number of ranks at the end.
        """
        buffer = check_buffer(buffer, "run")
        return self._collective("schedule", buffer, partial(self._flat, schedule=schedule, op=op), op, None, blocking)

    def reduce_scatter(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        self._open_channel()
        buffer = check_buffer(buffer, "reduce_scatter")
        check_reduction(buffer, op, "reduce_scatter")
        on_host = buffer.device == CPU or not self._device_memory
        if on_host and self._node is not None and (self.layout.nodes == 1 or self.choice.order_free_of_chunks):
            program = partial(self._node.reduce_scatter, op=op)
        elif self.choice.order_free_of_chunks:
            # The ring's order depends on the chunk; what all-reduces leaves every rank its chunk too.
            entry = self.choice.for_between(buffer.nbytes)
            program = partial(self._flat, schedule=_schedule(entry, buffer), op=op, look_ahead=_depth(entry))
        else:
            program = partial(self._flat, schedule=ring.reduce_scatter, op=op)
        return self._collective("reduce_scatter", buffer, program, op)

    def all_gather(self, buffer: Tensor) -> Work:
        buffer = check_buffer(buffer, "all_gather")
        if self._node is not None and self.layout.nodes == 1 and buffer.device == CPU:
            return self._collective("all_gather", buffer, self._node.all_gather)
        program = partial(self._flat, schedule=ring.all_gather, op=None)
        return self._collective("all_gather", buffer, program)

    def broadcast(self, buffer: Tensor, root: int = 0) -> Work:
        self._check_peer(root, "broadcast: root")
        buffer = check_buffer(buffer, "broadcast")

        def from_root(rank: int, size: int, length: int) -> Iterator[Step]:
            for step in tree.broadcast((rank - root) % size, size, length):
                send_to = None if step.send_to is None else (step.send_to + root) % size
                recv_from = None if step.recv_from is None else (step.recv_from + root) % size
                yield step._replace(send_to=send_to, recv_from=recv_from)

        program = partial(self._flat, schedule=from_root, op=None)
        return self._collective("broadcast", buffer, program, None, f"from rank {root}", staging_bytes=_STAGING_BYTES)

    def barrier(self) -> Work:
        return self._meet("barrier")

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> Work:
        self._check_peer(to, "send: to")
        host = check_buffer(buffer, "send").to(CPU)
        program = send(host, to, tag, self._messages, self.traffic.sent)
        return self._start(lambda: f"send to rank {to} (tag {tag})", host, program, None)

    def receive(self, buffer: Tensor, source: int | None = None, tag: int = 0) -> Work:
        if source is not None:
            self._check_peer(source, "receive: source")
        data = check_buffer(buffer, "receive")
        name = f"receive from {'any rank' if source is None else f'rank {source}'} (tag {tag})"
        return self._start(lambda: name, data, receive(data, source, tag, self._messages), None)

    def split(self, color: int, key: int = 0) -> "MpiCommunicator":
        # Peers may need steps of ours that are still queued, and a thread inside MPI_Comm_split takes none.
        self._meet("split").wait()
        with self._engine.lock:
            part = self._comm.Split(color, key)
        try:
            return MpiCommunicator(part, self._engine, self._choose, self.timeout_seconds, self.layout.node)
        finally:
            with self._engine.lock:
                part.Free()

    def abort(self, why: str) -> NoReturn:
        write_line(f"rank {self.rank} of {self.size}: {why}", sys.stderr)
        self._comm.Abort(1)
        raise SystemExit(1)

    def close(self) -> None:
        if self._channel is None:
            return
        self._meet("close").wait()
        self._engine.close_channel(self._channel)
        self._start(lambda: "close", self._nothing, self._watch.drain(), None).wait()
        self._channel = None
        self._node = None
        self.layout.close()
        with self._engine.lock:
            self._comm.Free()
            self._messages.Free()

    def abandon(self) -> None:
        """Let go of it without the other ranks, who need not call: after a failure, when they cannot come to `close`.

        MPI keeps what belongs to the communicator, and what has not ended keeps its memory, until the process ends.
        """
        if self._channel is None:
            return
        self._engine.close_channel(self._channel)
        with self._engine.lock:
            self._channel.fail(CommunicationError("the communicator was abandoned"))
        self._channel = None
        self._node = None

    def _open_channel(self) -> Channel:
        if self._channel is None:
            raise CommunicationError("the communicator is closed")
        return self._channel

    def _check_peer(self, rank: int, what: str) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{what}: rank {rank} is outside 0..{self.size - 1}")

    def _collective(
        self,
        operation: str,
        data: Tensor,
        program: Callable[[Tensor, int], tuple[Tensor, Program]],
        op: ReduceOp | None = None,
        how: str | None = None,
        blocking: bool = False,
        staging_bytes: int | None = None,
    ) -> Work:
        """Start the program that `program` makes for the flat data and the stamp, and where its result will be.

        `op` and `how` it is done must be the same on all ranks, as the operation and the kind of data. `staging_bytes`
        is the length of the segments in which a tensor on a GPU may be staged; None: only as a whole.
        """
        channel = self._open_channel()
        if self.size == 1:
            return FinishedWork(data)
        numel = data.numel()
        stamp = self._ledger.launch((operation, numel, data.dtype, op, how))
        number = self._ledger.launched
        if numel == 0:
            return FinishedWork(data)
        result = data
        if not data.is_cpu and not self._device_memory:
            steps = self._staged(data, program, stamp, staging_bytes)
        else:
            settle(data)
            flat = data if data.dim() == 1 else data.view(-1)
            total, steps = program(flat, stamp)
            if total is not flat:
                result = total.view(data.shape)

        def name() -> str:
            dtype = str(data.dtype).removeprefix("torch.")
            return f"{operation} of {numel} {dtype} (no. {number}, rank {self.rank} of {self.size})"

        return self._start(name, result, steps, channel, blocking, number)

    def _meet(self, operation: str, numel: int = 0, dtype: torch.dtype | None = None) -> Work:
        """A barrier of all ranks who say the same."""
        channel = self._open_channel()
        if self.size == 1:
            return FinishedWork(self._nothing)
        stamp = self._ledger.launch((operation, numel, dtype, None, None))
        number = self._ledger.launched
        if self._node is not None and self.layout.nodes == 1:
            program = self._node.barrier(stamp)
        else:
            program = self._run(torch.zeros(1, dtype=torch.uint8), stamp, recursive_doubling, ReduceOp.MAX, 1)

        def name() -> str:
            return f"{operation} (no. {number}, rank {self.rank} of {self.size})"

        return self._start(name, self._nothing, program, channel, number=number)

    def _staged(
        self,
        data: Tensor,
        program: Callable[[Tensor, int], tuple[Tensor, Program]],
        stamp: int,
        staging_bytes: int | None,
    ) -> Program:
        if data.device not in self._copiers:
            self._copiers[data.device] = CudaCopier(data.device)
        copier = self._copiers[data.device]
        host = copier.host_memory(data.numel(), data.dtype)
        segment = data.numel() if staging_bytes is None else max(1, staging_bytes // data.element_size())
        return staged(data, host, segment, lambda piece: program(piece, stamp)[1], copier)

    def _start(
        self,
        name: Callable[[], str],
        buffer: Tensor,
        program: Program,
        channel: Channel | None,
        blocking: bool = False,
        number: int = 0,
    ) -> Operation:
        self._open_channel()
        watch = None if channel is None else self._watch
        operation = Operation(self._engine, program, buffer, name, self.timeout_seconds, self.traffic, number, watch)
        self._engine.submit(operation, channel, blocking)
        if blocking:
            operation.wait()
        return operation

    def _flat(
        self, flat: Tensor, stamp: int, schedule: Schedule, op: ReduceOp | None, look_ahead: int = _LOOK_AHEAD
    ) -> tuple[Tensor, Program]:
        return flat, self._run(flat, stamp, schedule, op, look_ahead)

    def _run(self, flat: Tensor, stamp: int, schedule: Schedule, op: ReduceOp | None, look_ahead: int) -> Program:
        """Run a schedule over all ranks, narrow floats in float32 where they are added up."""
        wide = flat if op is None else flat.to(accumulator_dtype(flat.dtype, op))
        settle(wide)
        steps = schedule(self.rank, self.size, flat.numel())
        scratch = self._scratch.setdefault(flat.device, Scratch(flat.device))
        longest = None if self.layout.nodes == 1 else _LONGEST_BYTES_BETWEEN
        look_ahead = look_ahead if longest is None else _LOOK_AHEAD_SEGMENTS
        tag = first_tag(stamp, self._largest_tag)
        yield from Execution(wide, op, self._comm, scratch, self.traffic.sent, tag).run(steps, look_ahead, longest)
        if op is not None:
            finish(op, wide, self.size)
        if wide is not flat:
            flat.copy_(wide)
        settle(flat)

    def _between(self, flat: Tensor, op: ReduceOp, stamp: int) -> Program:
        """Combine a lane's chunk over the nodes."""
        entry = self.choice.for_between(flat.nbytes)
        steps = _schedule(entry, flat)(self.layout.node, self.layout.nodes, flat.numel())
        tag = first_tag(stamp, self._largest_tag)
        execution = Execution(flat, op, self.layout.lane, self._scratch[CPU], self.traffic.sent, tag)
        yield from execution.run(steps, _LOOK_AHEAD_SEGMENTS, _LONGEST_BYTES_BETWEEN)

    def _library(self, flat: Tensor, stamp: int, op: ReduceOp) -> tuple[Tensor, Program]:
        return flat, library_all_reduce(flat, stamp, op, self._comm, self._node, self.traffic.sent, self._watch.inquire)


def _schedule(entry: Entry, data: Tensor) -> Schedule:
    """Return the entry's schedule, its segments counted in elements of `data`."""
    segment = None if entry.segment_bytes is None else max(1, entry.segment_bytes // data.element_size())
    return ALL_REDUCE[entry.algorithm].schedule(segment)


def _depth(entry: Entry) -> int:
    return _LOOK_AHEAD if entry.segment_bytes is None else _LOOK_AHEAD_SEGMENTS
