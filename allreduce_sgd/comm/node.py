"""All-reduce within a node through shared memory, and on two levels: inside nodes and between them.

Window path, for buffers that `allocate` gave. Rank i of the q ranks of a node reduces chunk i of the buckets of all
ranks, straight out of their memory, and writes it to all of their buckets (in place) or to the one result that all of
them share. Steps: two barriers. Bytes per rank, n the bucket's: reads n, writes n in place or n/q into the shared
result; at q = 2 that is 4n of memory traffic on the node in place, 3n with a shared result, the least there is.

Staged path, for any other tensor: pieces go through slots of shared memory, two of them in turn, so that a rank copies
piece k+1 in and piece k out around one barrier a piece. Small ones take one barrier: every rank adds all slots itself.

Two levels and as many lanes as every node has ranks: after rank i has reduced its chunk, it all-reduces it with the
ranks i of the other nodes, by a schedule, while its neighbours do the same with theirs. Each node puts what one rank
alone would send on the wire, 2(N-1)/N n with a ring or halving-doubling over N nodes, not q times that. (Two levels as
in Jia et al., "Highly scalable deep learning training system with mixed-precision", arXiv 1807.11205; several lanes as
in Träff and Hunold, "Decomposing MPI collectives for exploiting multi-lane communication", CLUSTER 2020.)

Order of summation: by local rank, whatever the chunk, then that of the schedule between nodes.
"""

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.ledger import NUMBER_SHIFT
from allreduce_sgd.comm.progress import Program, Sleeper
from allreduce_sgd.comm.reduction import accumulator_dtype, finish, reduce_into
from allreduce_sgd.comm.shared_memory import NOTE_NUMBERS, SharedMemory, Views
from allreduce_sgd.errors import MismatchError
from allreduce_sgd.schedules.step import chunk

__all__ = ["SLOTS", "NodeAllReduce"]

Between = Callable[[Tensor, ReduceOp, int], Program]
"""Combines a flat tensor with the other nodes' ranks of this lane, in place, for the operation with this stamp; AVERAGE
adds without dividing."""

# Two for pieces, by turns, and two for small tensors, so that one operation need not wait for the readers of the last.
SLOTS = 4
# Up to here one barrier and every rank adding everything beats two barriers and every rank adding its chunk; of what
# would have to be copied into slots in any case, all ranks' data together count.
_SMALL_BYTES = 32 * 1024
_SMALL_PRIVATE_BYTES = 512 * 1024


class NodeAllReduce:
    """Programs that all-reduce over the ranks of a node, and over `nodes` nodes with `between`.

    `lanes` is the smallest number of ranks on any node; `size` the number of ranks of all nodes. `count` is told the
    bytes that this rank reads from or writes to a peer's memory. `inquire` finds out, where ranks came with operations
    of different stamps, what each has, and raises that or the error it is given.
    """

    def __init__(
        self,
        memory: SharedMemory,
        between: Between | None,
        lanes: int,
        size: int,
        count: Callable[[int], None],
        inquire: Callable[[Exception], Program],
    ) -> None:
        self._memory = memory
        self._between = between
        self._lanes = lanes
        self._size = size
        self._count = count
        self._inquire = inquire
        self._parity = 0
        # What a rank brings to a barrier, two numbers: its operation's stamp (`ledger.py`), and where its data lie in
        # the shared memory. By turns in two places, so that a rank ahead does not overwrite what others still read.
        starts = range(0, memory.local_size * NOTE_NUMBERS, NOTE_NUMBERS)
        self._own_notes = [starts[memory.local_rank] + half for half in (0, NOTE_NUMBERS // 2)]
        peers = [start for rank, start in enumerate(starts) if rank != memory.local_rank]
        self._peers_notes = [[start + half for start in peers] for half in (0, NOTE_NUMBERS // 2)]

    def all_reduce(self, data: Tensor, stamp: int, op: ReduceOp, shared_result: bool) -> tuple[Tensor, Program]:
        """Return where the result of reducing the flat tensor will be, and the program that makes it."""
        views = self._memory.find(data)
        small_bytes = _SMALL_BYTES if views is not None else _SMALL_PRIVATE_BYTES // self._memory.local_size
        if self._between is None and data.nbytes <= small_bytes:
            return data, self._reduce_small(data, stamp, op)
        result = views.result if shared_result and views is not None else data
        return result, self._reduce(data, views, stamp, op, shared_result)

    def reduce_scatter(self, data: Tensor, stamp: int, op: ReduceOp) -> tuple[Tensor, Program]:
        """Return the flat tensor and the program that makes this rank's chunk of it the reduction.

        On one node, from the window, that is half of an all-reduce; otherwise it is a whole one.
        """
        return data, self._reduce_scatter(data, self._memory.find(data), stamp, op)

    def all_gather(self, data: Tensor, stamp: int) -> tuple[Tensor, Program]:
        """Return the flat tensor and the program that fills it with all ranks' chunks. On one node only."""
        return data, self._all_gather(data, self._memory.find(data), stamp)

    def barrier(self, stamp: int) -> Program:
        """Return the program that ends when all ranks of the node run it."""
        return self._meet(stamp, None)

    def agree(self, stamp: int) -> bool:
        """Leave a note, and say whether it contradicts none that a rank of the node left before.

        It waits for nobody, and is for operations that wait for all ranks by themselves. Where two ranks come at the
        very same time both may miss it.
        """
        self._parity = parity = self._parity ^ 1
        notes, number = self._memory.notes, stamp >> NUMBER_SHIFT
        notes[self._own_notes[parity]] = stamp
        for place in self._peers_notes[parity]:
            other = notes[place]
            if other != stamp and other >> NUMBER_SHIFT == number:
                return False
        return True

    def _all_gather(self, data: Tensor, views: Views | None, stamp: int) -> Program:
        counterparts = yield from self._meet(stamp, views)
        memory, length = self._memory, data.numel()
        own = chunk(length, memory.local_size, memory.local_rank)
        if counterparts and views is not None:
            for rank in range(memory.local_size):
                if rank != memory.local_rank:
                    piece = chunk(length, memory.local_size, rank)
                    data[piece].copy_(views.buffers[rank][piece])
            yield from memory.barrier.pass_through()
        else:
            # Piece k of everyone's chunk at once; chunk 0 is the longest.
            step, longest = memory.slot_bytes // data.element_size(), chunk(length, memory.local_size, 0)
            for start in range(0, longest.stop - longest.start, step):
                mine = data[own][start : start + step]
                memory.staging(0, mine.numel(), data.dtype).buffers[memory.local_rank].copy_(mine)
                yield from memory.barrier.pass_through()
                for rank in range(memory.local_size):
                    if rank != memory.local_rank:
                        theirs = data[chunk(length, memory.local_size, rank)][start : start + step]
                        theirs.copy_(memory.staging(0, theirs.numel(), data.dtype).buffers[rank])
                yield from memory.barrier.pass_through()
        self._count(data.nbytes - data[own].nbytes)

    def _reduce_scatter(self, data: Tensor, views: Views | None, stamp: int, op: ReduceOp) -> Program:
        counterparts = yield from self._meet(stamp, views)
        if counterparts and views is not None:
            own = None if self._between is None else views.buffers
            yield from self._reduce_chunk(views, own or [views.buffers[self._memory.local_rank]], stamp, op)
            yield from self._memory.barrier.pass_through()
        else:
            yield from self._reduce_staged(data, stamp, op)

    def _reduce(self, data: Tensor, views: Views | None, stamp: int, op: ReduceOp, shared_result: bool) -> Program:
        counterparts = yield from self._meet(stamp, views)
        if counterparts and views is not None:
            yield from self._reduce_chunk(views, None if shared_result else views.buffers, stamp, op)
            yield from self._memory.barrier.pass_through()
        else:
            yield from self._reduce_staged(data, stamp, op)
            if shared_result and views is not None:
                views.result.copy_(data)

    def _reduce_small(self, data: Tensor, stamp: int, op: ReduceOp) -> Program:
        """Add all ranks' data on every rank: one barrier."""
        # By turns with the operation before, whose slots others may still be reading; `_meet` makes the next turn.
        slots = self._memory.staging(2 + (self._parity ^ 1), data.numel(), data.dtype)
        slots.buffers[self._memory.local_rank].copy_(data)
        if (yield from self._meet(stamp, None)):
            self._count_peers(data)
            reduce_into([data], slots.buffers, op, self._size)
        else:
            # Some rank's data lie in the window, and are not small there.
            yield from self._reduce_staged(data, stamp, op)

    def _meet(self, stamp: int, views: Views | None) -> Generator[bool | Sleeper, None, bool]:
        """Pass the first barrier; say whether all ranks brought counterparts of the same allocation.

        Raises MismatchError where they came with different operations.
        """
        self._parity = parity = self._parity ^ 1
        notes, own = self._memory.notes, self._own_notes[parity]
        where = 0 if views is None else views.place + 1
        notes[own] = stamp
        notes[own + 1] = where
        yield from self._memory.barrier.pass_through()
        counterparts = True
        for place in self._peers_notes[parity]:
            if notes[place] != stamp:
                told = "a rank of this node has launched something else, now or before, and does not tell what"
                yield from self._inquire(MismatchError(told))
            if notes[place + 1] != where:
                counterparts = False
        return counterparts

    def _reduce_chunk(self, views: Views, into: list[Tensor] | None, stamp: int, op: ReduceOp) -> Program:
        """Reduce this rank's chunk of all buffers into the shared result, or (in place) `into` all of the buffers."""
        if self._memory.local_rank >= self._lanes:
            return
        piece = chunk(views.result.numel(), self._lanes, self._memory.local_rank)
        sources = [buffer[piece] for buffer in views.buffers]
        targets = [target[piece] for target in into or [views.result]]
        self._count_peers(sources[0])
        if self._between is None:
            reduce_into(targets, sources, op, self._size)
        else:
            total = views.result[piece]
            if total.dtype is not accumulator_dtype(total.dtype, op):
                total = torch.empty(total.numel(), dtype=accumulator_dtype(total.dtype, op))
            reduce_into([total], sources, op, None)
            yield from self._between(total, op, stamp)
            finish(op, total, self._size)
            for target in targets:
                if target.data_ptr() != total.data_ptr():
                    target.copy_(total)
        if len(targets) > 1:
            self._count_peers(sources[0])

    def _reduce_staged(self, data: Tensor, stamp: int, op: ReduceOp) -> Program:
        memory, length = self._memory, data.numel()
        step = memory.slot_bytes // data.element_size()
        pieces = [slice(start, min(start + step, length)) for start in range(0, length, step)]

        def slots(index: int) -> Views:
            return memory.staging(index % 2, pieces[index].stop - pieces[index].start, data.dtype)

        slots(0).buffers[memory.local_rank].copy_(data[pieces[0]])
        yield from memory.barrier.pass_through()
        for index, piece in enumerate(pieces):
            if index + 1 < len(pieces):
                slots(index + 1).buffers[memory.local_rank].copy_(data[pieces[index + 1]])
            views = slots(index)
            yield from self._reduce_chunk(views, None, stamp, op)
            yield from memory.barrier.pass_through()
            data[piece].copy_(views.result)
            # Of the result the other ranks' chunks are new to this one, as many elements as its own to them.
            self._count(views.result.nbytes * (self._lanes - 1) // self._lanes)

    def _count_peers(self, piece: Tensor) -> None:
        """Count the piece once for every peer out of whose memory, or into which, it goes."""
        self._count((self._memory.local_size - 1) * piece.nbytes)
