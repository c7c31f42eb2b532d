"""Building columns: one round of all ranks as arrays, without a Python loop over ranks.

Every algorithm has a columnar form beside its generator, so that a simulator can follow thousands of ranks; `check.py`
holds the two against each other.
"""

import numpy as np

from allreduce_sgd.schedules.step import Booleans, Column, Integers

__all__ = ["column"]

Index = Integers | int
Ranks = Booleans | bool


def column(
    size: int,
    *,
    sends: Ranks,
    send_to: Index,
    send: tuple[Index, Index],
    receives: Ranks,
    recv_from: Index,
    recv: tuple[Index, Index],
    reduce: bool,
) -> Column:
    """Return a round of `size` ranks; each entry is a scalar, the same for all ranks, or an array of shape (size,).

    `send` and `recv` are (starts, stops). `reduce` holds for all that receive.
    """

    def integers(entries: Index) -> Integers:
        return np.broadcast_to(np.asarray(entries, np.int64), (size,))

    def booleans(entries: Ranks) -> Booleans:
        return np.broadcast_to(np.asarray(entries, np.bool_), (size,))

    return Column(
        sends=booleans(sends),
        send_to=integers(send_to),
        send_start=integers(send[0]),
        send_stop=integers(send[1]),
        receives=booleans(receives),
        recv_from=integers(recv_from),
        recv_start=integers(recv[0]),
        recv_stop=integers(recv[1]),
        reduce=booleans(receives if reduce else False),
    )
