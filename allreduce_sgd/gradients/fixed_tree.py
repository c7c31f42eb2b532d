"""Sums in one order, whoever adds: a binary tree over V leaves that depends on V alone.

Floating-point addition is not associative, so a sum over ranks rounds differently on another number of ranks. Here it
is one of V leaves, of which rank r of P holds the r-th V/P. Leaves a..b-1 are split where the left part is the largest
power of two below b - a, and the sum of a node is that of its left part plus that of its right one: one rounding of
every element, the same in whatever slices and on whatever rank it is done. V - 1 additions, of which no element goes
through more than log2 V, rounded up: the error bound of pairwise summation (Higham, SIAM J. Sci. Comput. 14(4), 1993).

A rank first adds up its own leaves as far as the tree lets it, which leaves the k largest nodes within its range: one
where V/P is a power of two, else up to 2 log2 (V/P). For the rest each rank owns a chunk of the vector: all send it
that chunk of their nodes, it adds them up in the tree's order, and the chunks are gathered. Bytes per rank: k (P-1)/P n
for the nodes and (P-1)/P n for the sum, with k = 1 those of a ring, in 2 rounds.

Differences from the usual reproducible sums (Demmel and Nguyen, IEEE Trans. Comput. 64(7), 2015), which are the same in
any order: these need no wider numbers and no second pass, but leaves must be cut alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.compression.messages import Together, has_messages
from allreduce_sgd.gradients.exchange import Flight, Rounds
from allreduce_sgd.schedules.step import chunk

__all__ = ["FixedTree", "Node", "PartialSums"]

# Messages between two ranks come in the order in which they were sent, and exchanges of all vectors start alike.
_TAG = 31253


class Node(NamedTuple):
    """The leaves `start` to `stop` - 1, where the tree adds them up by themselves."""

    start: int
    stop: int

    @property
    def parts(self) -> "tuple[Node, Node]":
        """What is added to make this node, of two leaves at least."""
        middle = self.start + (1 << (self.stop - self.start - 1).bit_length() - 1)
        return Node(self.start, middle), Node(middle, self.stop)

    def within(self, start: int, stop: int) -> "list[Node]":
        """Return the largest nodes at or below this one that have no leaves but start..stop-1, in order."""
        if start <= self.start and self.stop <= stop:
            return [self]
        if stop <= self.start or self.stop <= start:
            return []
        left, right = self.parts
        return left.within(start, stop) + right.within(start, stop)


class FixedTree:
    """The tree over `leaves`, of which every rank of `comm` holds equally many, the first ones on rank 0.

    `own` are the leaves of this rank. Raises ValueError where the leaves cannot be shared out evenly, or the back end
    has no messages between two ranks.
    """

    def __init__(self, leaves: int, comm: Communicator) -> None:
        if leaves < 1 or leaves % comm.size:
            raise ValueError(f"{leaves} leaves cannot be shared out evenly to {comm.size} ranks")
        if comm.size > 1 and not has_messages(comm):
            raise ValueError(f"back end {comm.backend} has no messages between two ranks; take mpi or gloo")
        self.comm = comm
        self.root = Node(0, leaves)
        each = leaves // comm.size
        self.own = range(comm.rank * each, (comm.rank + 1) * each)
        self._held = [self.root.within(rank * each, (rank + 1) * each) for rank in range(comm.size)]

    def reduce(self, nodes: Sequence[Tensor], total: Tensor) -> Rounds:
        """Make `total` the sum of all leaves, given the sums of this rank's largest nodes, in order.

        All are flat, of one length and dtype; `total` may be the first of the nodes, and the nodes' elements become
        undefined. The same bits on all ranks and on any number of them. All ranks must call; exchanges of several
        vectors must be started, and advanced to their second work, in the same order on all ranks.
        """
        comm, numel = self.comm, total.numel()
        mine = chunk(numel, comm.size, comm.rank)
        sums = {node: vector[mine] for node, vector in zip(self._held[comm.rank], nodes, strict=True)}
        works: list[Work] = []
        for distance in range(1, comm.size):
            source, to = (comm.rank - distance) % comm.size, (comm.rank + distance) % comm.size
            if mine.stop > mine.start:
                for node in self._held[source]:
                    sums[node] = torch.empty_like(total[mine])
                    works.append(comm.receive(sums[node], source, _TAG))
            theirs = chunk(numel, comm.size, to)
            if theirs.stop > theirs.start:
                works += [comm.send(vector[theirs], to, _TAG) for vector in nodes]
        if works:
            yield Together(works, total, comm.timeout_seconds)
        if mine.stop > mine.start:
            result = _added(self.root, sums)
            if result.data_ptr() != total[mine].data_ptr():
                total[mine].copy_(result)
        if comm.size > 1:
            yield comm.all_gather(total)


class PartialSums:
    """The sums of this rank's leaves, as far as the tree adds them up by themselves, of one or several vectors.

    `first` is the memory of the first node, flat vectors of any dtypes, and of the total. Leaves come in their order:
    write each into `leaf()`, then `add()` it. With those of `first` it keeps log2 (V/P) + 1 sets of vectors where V/P
    is a power of two, at most about twice as many else.
    """

    def __init__(self, tree: FixedTree, first: Sequence[Tensor]) -> None:
        self.tree = tree
        self._levels = [list(first)]
        self._nodes: list[Node] = []
        self._next = tree.own.start

    @property
    def depth(self) -> int:
        """How many nodes there are now, and at which place among them the next leaf stands."""
        return len(self._nodes)

    def leaf(self) -> list[Tensor]:
        """Return the memory for the next leaf, undefined."""
        if self.depth == len(self._levels):
            self._levels.append([torch.empty_like(vector) for vector in self._levels[0]])
        return self._levels[self.depth]

    def add(self) -> None:
        """Take what stands in `leaf()` as the next leaf."""
        self._nodes.append(Node(self._next, self._next + 1))
        self._next += 1
        while len(self._nodes) > 1:
            left, right = self._nodes[-2:]
            both = Node(left.start, right.stop)
            if self.tree.root.within(*both) != [both]:
                return
            for target, other in zip(*self._levels[len(self._nodes) - 2 : len(self._nodes)], strict=True):
                target.add_(other)
            self._nodes[-2:] = [both]

    def finish(self) -> None:
        """Make the memory of the first node the total of all ranks' leaves, and begin anew with the first leaf.

        All ranks must call, when all leaves have been added.
        """
        if self._next != self.tree.own.stop:
            raise RuntimeError(f"PartialSums: leaf {self._next} of {self.tree.root.stop} has not been added")
        held = self._levels[: self.depth]
        self._nodes, self._next = [], self.tree.own.start
        flights = [
            Flight(self.tree.reduce([node[index] for node in held], total))
            for index, total in enumerate(self._levels[0])
        ]
        for flight in flights:
            flight.advance()
        for flight in flights:
            flight.land()


def _added(node: Node, sums: dict[Node, Tensor]) -> Tensor:
    """Return the sum of a node out of those of nodes below it, in whose memory it is made."""
    if node in sums:
        return sums[node]
    left, right = node.parts
    return _added(left, sums).add_(_added(right, sums))
