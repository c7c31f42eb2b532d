"""How the ranks of a communicator are spread over nodes, and what they share there.

Ranks of one node are those for which MPI can make shared memory. A lane joins the ranks of one local rank on all nodes;
there are as many lanes as the smallest node has ranks.
"""

import contextlib
import threading
from typing import Any

from mpi4py import MPI

from allreduce_sgd.comm.node import SLOTS
from allreduce_sgd.comm.shared_memory import SharedMemory
from allreduce_sgd.errors import MemoryNotSharedError

__all__ = ["Layout"]

# Pieces of what lies in private memory: long enough that the two barriers of each do not count (pieces of 512 KiB took
# a third longer on 2 cores); between nodes the message of one lane should be long too.
_SLOT_BYTES = 2 * 2**20
_SLOT_BYTES_BETWEEN = 4 * 2**20


class Layout:
    """All ranks of the mpi4py communicator `comm` must make it together, while no other thread uses `comm`.

    `node` is this rank's node of `nodes`, numbered by their first ranks; `nodes_of` lists the nodes of all ranks.
    `memory` is None on all ranks where on any node they cannot share memory, and every rank counts as a node of its
    own then. `lane` is the mpi4py communicator of this rank's lane, ranked by node; None where this rank has none or
    there is one node.
    """

    def __init__(
        self, comm: Any, lock: threading.Lock, timeout_seconds: float, spin: bool, node_color: int | None
    ) -> None:
        rank, everyone = comm.Get_rank(), range(comm.Get_size())
        self._lock = lock
        with lock:
            if node_color is None:
                self._local = comm.Split_type(MPI.COMM_TYPE_SHARED, key=rank)
            else:
                self._local = comm.Split(node_color, key=rank)
            leaders = comm.allgather(self._local.bcast(rank, root=0))
        slot_bytes = _SLOT_BYTES if len(set(leaders)) == 1 else _SLOT_BYTES_BETWEEN
        self.memory: SharedMemory | None = None
        # Without it collectives are slower and otherwise the same; who asked for it by name is told by the choice.
        with contextlib.suppress(MemoryNotSharedError):
            self.memory = SharedMemory(self._local, lock, timeout_seconds, spin, slot_bytes, SLOTS)
        with lock:
            if not all(comm.allgather(self.memory is not None)):
                self.memory = None
                leaders = list(everyone)
        firsts = sorted(set(leaders))
        self.nodes = len(firsts)
        self.node = firsts.index(leaders[rank])
        self.nodes_of = [firsts.index(leader) for leader in leaders]
        self.local_rank = leaders[:rank].count(leaders[rank])
        self.lanes = min(leaders.count(first) for first in firsts)
        self.lane: Any = None
        if self.nodes > 1:
            with lock:
                part = comm.Split(self.local_rank if self.local_rank < self.lanes else MPI.UNDEFINED, key=self.node)
            self.lane = None if part == MPI.COMM_NULL else part

    @property
    def pairs_share(self) -> bool:
        """Whether any two ranks share memory: where each node has one rank, going through it would only be a copy."""
        return self.memory is not None and self.nodes < len(self.nodes_of)

    def close(self) -> None:
        """All ranks must call, while nothing is under way."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        with self._lock:
            self._local.Free()
            if self.lane is not None:
                self.lane.Free()
