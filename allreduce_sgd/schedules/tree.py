"""Binomial-tree broadcast: in round k every rank that has the buffer passes it to the rank 2^k further on.

Paper: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.

Rounds: ceil(log2 P). Rank at distance d from the root receives once (d > 0) and sends n elements to each d + 2^k < P
with 2^k > d; all ranks together send (P-1)n. The root is rank 0.
"""

from collections.abc import Iterator

from allreduce_sgd.schedules.step import NOTHING, Step

__all__ = ["broadcast", "children"]


def broadcast(rank: int, size: int, length: int) -> Iterator[Step]:
    """Afterwards every rank holds the buffer of rank 0."""
    whole = slice(0, length)
    if rank > 0:
        parent = rank - (1 << (rank.bit_length() - 1))
        yield Step(None, NOTHING, parent, whole, reduce=False)
    for child in children(rank, size):
        yield Step(child, whole, None, NOTHING, reduce=False)


def children(rank: int, size: int) -> list[int]:
    """Return the ranks to which `rank` passes the buffer, in order."""
    distances = (1 << k for k in range(rank.bit_length(), (size - 1).bit_length()))
    return [rank + distance for distance in distances if rank + distance < size]
