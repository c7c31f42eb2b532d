"""Making the replicas of a model equal, and proving first that they can be."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.errors import MismatchError

__all__ = [
    "average_buffers",
    "broadcast_tensors",
    "check_same_model",
    "common_sha256",
    "parameters_sha256",
    "ranks_text",
]

_CHUNK_BYTES = 32 * 2**20


def check_same_model(module: nn.Module, comm: Communicator) -> None:
    """Raise MismatchError, naming the first tensor that differs and the ranks, unless all ranks hold the same model.

    Compared are the names, shapes, strides, dtypes and requires_grad of parameters and buffers, in order, not their
    values. All ranks must call.
    """
    mine = [_describe(kind, name, tensor) for kind, name, tensor in _tensors(module)]
    digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
    if len(set(all_gather_object(comm, digest))) == 1:
        return
    everyone: list[list[str]] = all_gather_object(comm, mine)
    for index in range(max(map(len, everyone))):
        views: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            views.setdefault(theirs[index] if index < len(theirs) else "nothing more", []).append(rank)
        if len(views) > 1:
            told = "; ".join(
                f"{ranks_text(ranks)} {'have' if len(ranks) > 1 else 'has'} {what}" for what, ranks in views.items()
            )
            raise MismatchError(f"the model differs between ranks: {told}")


def broadcast_tensors(tensors: Iterable[Tensor], comm: Communicator, root: int = 0) -> None:
    """Overwrite the tensors by those of rank `root`, in a few large messages. All ranks must call, with equal ones."""
    with torch.no_grad():
        for group in _groups(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            _scatter_back(comm.broadcast(flat, root).wait(), group)


def average_buffers(module: nn.Module, comm: Communicator, ranks: Sequence[int] | None = None) -> None:
    """Make buffers equal on all ranks: floating-point ones their average, the others rank 0's. All ranks must call.

    With `ranks` only those count, in the average, and the last of them instead of rank 0.
    """
    if comm.size == 1:
        return
    buffers = [buffer for buffer in module.buffers() if buffer.numel()]
    with torch.no_grad():
        for group in _groups(buffers):
            flat = torch.cat([buffer.reshape(-1) for buffer in group])
            if not (flat.is_floating_point() or flat.is_complex()):
                flat = comm.broadcast(flat, 0 if ranks is None else ranks[-1]).wait()
            elif ranks is None:
                flat = comm.all_reduce(flat, ReduceOp.AVERAGE).wait()
            else:
                mine = flat if comm.rank in ranks else flat.zero_()
                flat = comm.all_reduce(mine).wait() / len(ranks)
            _scatter_back(flat, group)


def parameters_sha256(module: nn.Module) -> str:
    """Return a hash of the names, shapes, dtypes and values of all parameters and buffers of this rank's model."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def common_sha256(module: nn.Module, comm: Communicator) -> str:
    """Return `parameters_sha256`, or raise MismatchError unless it is the same on all ranks. All ranks must call."""
    views: dict[str, list[int]] = {}
    for rank, digest in enumerate(all_gather_object(comm, parameters_sha256(module))):
        views.setdefault(digest, []).append(rank)
    if len(views) > 1:
        told = "; ".join(f"{ranks_text(ranks)}: {digest[:12]}" for digest, ranks in views.items())
        raise MismatchError(f"the final parameters differ between ranks (SHA-256 {told})")
    return next(iter(views))


def _tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield "parameter", name, parameter
    for name, buffer in module.named_buffers():
        yield "buffer", name, buffer


def _describe(kind: str, name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    trained = "" if kind == "buffer" else ", trained" if tensor.requires_grad else ", frozen"
    return f"{kind} {name!r} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, {dtype}{trained}"


def ranks_text(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype and device into lists of bounded size, in an order that is the same on all ranks."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in kinds.values():
        group: list[Tensor] = []
        size_bytes = 0
        for tensor in members:
            group.append(tensor)
            size_bytes += tensor.nbytes
            if size_bytes >= _CHUNK_BYTES:
                yield group
                group, size_bytes = [], 0
        if group:
            yield group


def _scatter_back(flat: Tensor, group: list[Tensor]) -> None:
    for tensor, piece in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
        tensor.copy_(piece.view(tensor.shape))
