"""MPI's own all-reduce, for the dtypes and operations for which its result is the same on all ranks.

It does not show what it sends: what is handed to it counts as sent. It takes no tags either, so that where ranks give
it different things it may fail, never end, end with a wrong result (MPICH 5) or end the process (Open MPI 5). So
ranks that share memory compare what they came with before; between nodes there is only what `desync.py` finds later.
"""

from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.node import NodeAllReduce
from allreduce_sgd.comm.progress import Program
from allreduce_sgd.comm.reduction import finish
from allreduce_sgd.comm.staging import settle
from allreduce_sgd.errors import MismatchError

__all__ = ["library_all_reduce", "library_can"]

_TYPES = {
    torch.float64: MPI.DOUBLE,
    torch.float32: MPI.FLOAT,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.uint8: MPI.UINT8_T,
}
_OPS = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.AVERAGE: MPI.SUM,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.PRODUCT: MPI.PROD,
}


def library_can(buffer: Tensor, op: ReduceOp) -> bool:
    """Say whether MPI's own all-reduce knows the dtype and gives the same result on all ranks.

    Minima and maxima of floats it compares in an order that depends on the rank: where one is NaN, results differ.
    """
    return buffer.dtype in _TYPES and not (buffer.is_floating_point() and op in (ReduceOp.MIN, ReduceOp.MAX))


def library_all_reduce(
    flat: Tensor,
    stamp: int,
    op: ReduceOp,
    comm: Any,
    node: NodeAllReduce | None,
    count: Callable[[int], None],
    inquire: Callable[[Exception], Program],
) -> Program:
    """All-reduce the flat tensor in place over the mpi4py communicator `comm`.

    The ranks of a node that share memory, `node`, compare the operations' stamps before. `count` is told the bytes,
    and `inquire` is run where the stamps differ or MPI fails.
    """
    try:
        if node is not None and not node.agree(stamp):
            raise MismatchError(
                "a rank of this node has launched something else, now or before, and does not tell what"
            )
        block = MPI.buffer.fromaddress(flat.data_ptr(), flat.nbytes)
        count(flat.nbytes)
        request = comm.Iallreduce(MPI.IN_PLACE, [block, _TYPES[flat.dtype]], _OPS[op])
        while not request.Test():
            yield False
    except (MPI.Exception, MismatchError) as problem:
        yield from inquire(problem)
    finish(op, flat, comm.Get_size())
    settle(flat)
