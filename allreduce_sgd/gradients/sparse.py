"""The sum over ranks of sparse gradients, such as those of an Embedding with sparse=True.

Every rank gathers the indices and values of all: two all-gathers, after one of how many there are. Bytes per rank: the
indices and values of all ranks, each padded to the longest. That is less than reducing the dense gradient as long as
few rows are touched. Where some rank's gradient is dense (the parameter is used elsewhere too), all become dense.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator

__all__ = ["gather_sparse", "gradient_values", "has_sparse_gradients"]

_NONE, _DENSE = -1, -2


def has_sparse_gradients(model: nn.Module) -> bool:
    """Say whether the model has layers whose gradients are sparse (Embedding and EmbeddingBag with sparse=True)."""
    return any(getattr(layer, "sparse", False) for layer in model.modules())


def gradient_values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the numbers of the gradients that there are: dense ones as they are, of sparse ones the touched rows.

    In place: sparse gradients are coalesced, since rows that occur several times would hide their norm. What is written
    to the returned tensors is written to the gradients.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    return values


def gather_sparse(parameter: Tensor, gradient: Tensor | None, factor: float, comm: Communicator) -> Tensor | None:
    """Return the sum over ranks of factor times gradient; None where no rank has one. All ranks must call.

    `gradient` is sparse, dense or None, of the parameter's shape. The sum is a coalesced sparse tensor, or dense where
    any rank's is dense; the same bits on all ranks.
    """
    with torch.no_grad():
        if gradient is not None and gradient.is_sparse:
            gradient = gradient.coalesce()
        counts = torch.zeros(comm.size, dtype=torch.int64)
        counts[comm.rank] = _NONE if gradient is None else gradient._nnz() if gradient.is_sparse else _DENSE
        comm.all_gather(counts).wait()
        longest = int(counts.max())
        if (counts == _DENSE).any():
            whole = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            return comm.all_reduce(whole.mul(factor).contiguous()).wait()
        if longest < 0:
            return None
        if gradient is None:
            gradient = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device).to_sparse(1)
        own = gradient.indices(), gradient.values()
        indices, values = (_all_rows(part, longest, comm) for part in (own[0].t(), own[1] * factor))
        kept = torch.cat(
            [torch.arange(rank * longest, rank * longest + int(n)) for rank, n in enumerate(counts) if n > 0]
        )
        kept = kept.to(indices.device)
        rows = indices[kept].t()
        return torch.sparse_coo_tensor(rows, values[kept], parameter.shape, check_invariants=False).coalesce()


def _all_rows(rows: Tensor, longest: int, comm: Communicator) -> Tensor:
    """Return all ranks' rows one after another, `longest` for each, those beyond a rank's own undefined."""
    everyone = torch.zeros(comm.size, longest, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    everyone[comm.rank, : len(rows)] = rows
    comm.all_gather(everyone.view(-1)).wait()
    return everyone.flatten(0, 1)
