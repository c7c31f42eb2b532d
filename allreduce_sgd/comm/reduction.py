"""How pieces of tensors are combined: the arithmetic of all reductions, by torch, for every dtype.

float16 and bfloat16 are accumulated in float32 and rounded once at the end, whatever the number of ranks: one by one
they would round at every addition, and sums of float16 beyond 65504 would overflow before they are averaged.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from allreduce_sgd.comm.base import ReduceOp

__all__ = ["accumulator_dtype", "combine", "finish", "reduce_into"]

# Two blocks and their sum stay in a core's second-level cache (1 MiB and more on current servers), where the result is
# written to several buffers; and one block takes some ten times as long as the calls that start it.
_BLOCK_BYTES = 256 * 1024

_COMBINE: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVERAGE: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.PRODUCT: torch.mul,
}


def accumulator_dtype(dtype: torch.dtype, op: ReduceOp) -> torch.dtype:
    """Return the dtype in which buffers of `dtype` are combined; minima and maxima need no wider one."""
    narrow = dtype in (torch.float16, torch.bfloat16) and op not in (ReduceOp.MIN, ReduceOp.MAX)
    return torch.float32 if narrow else dtype


def combine(op: ReduceOp, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the combination of two tensors to `out`, of the accumulator's dtype, which may be one of them."""
    _COMBINE[op](left, right, out=out)


def finish(op: ReduceOp, total: Tensor, ranks: int) -> None:
    """Turn the combination of all ranks' data into the result, in place: AVERAGE divides, the others are done."""
    if op is ReduceOp.AVERAGE:
        total.div_(ranks)


def reduce_into(targets: Sequence[Tensor], sources: Sequence[Tensor], op: ReduceOp, average_over: int | None) -> None:
    """Combine flat `sources` of one length in their order, and write the result to every one of `targets`.

    Element i of the result is ((s_0[i] op s_1[i]) op s_2[i]) ..., whatever the length: the order of summation does not
    depend on where a buffer is cut. `average_over` is the number of ranks to divide by, None if others are still to be
    added. Targets may be sources, or have the accumulator's dtype.
    """
    length = sources[0].numel()
    if length == 0:
        return
    dtype = accumulator_dtype(sources[0].dtype, op)
    # One target takes the whole length at once: nothing is gained by going through the cache block by block.
    whole = len(targets) == 1 and len(sources) <= 2 and dtype is sources[0].dtype
    block = length if whole else min(length, _BLOCK_BYTES // dtype.itemsize)
    first = targets[0]
    direct = first.dtype is dtype and all(first.data_ptr() != source.data_ptr() for source in sources[2:])
    scratch = None if direct else torch.empty(block, dtype=dtype)
    for start in range(0, length, block):
        piece = slice(start, start + block)
        into = targets if block == length else [target[piece] for target in targets]
        parts = sources if block == length else [source[piece] for source in sources]
        total = into[0] if scratch is None else scratch[: parts[0].numel()]
        _accumulate(total, parts, op)
        if average_over is not None:
            finish(op, total, average_over)
        for target in into if scratch is not None else into[1:]:
            target.copy_(total)


def _accumulate(total: Tensor, sources: Sequence[Tensor], op: ReduceOp) -> None:
    if len(sources) == 1:
        total.copy_(sources[0])
        return
    rest = list(sources)
    if total.dtype is sources[0].dtype:
        combine(op, rest.pop(0), rest.pop(0), total)
    else:
        total.copy_(rest.pop(0))
    for source in rest:
        combine(op, total, source, total)
