"""The average over ranks of what an optimizer keeps for its parameters: momentum, Adam's moments.

Lin et al. 2018 (arXiv 1808.07217) leave momentum local; Yu, Jin and Yang, "On the linear speedup analysis of
communication efficient momentum SGD", ICML 2019, arXiv 1905.03817, average it together with the model.

All floating-point tensors but `step` counters are averaged, with equal weights. A rank that keeps nothing yet for a
parameter, since it had no samples or no gradient of it, counts as zeros, and goes on keeping nothing.

Bytes per rank: an all-reduce of these tensors, so one model for momentum, two for Adam. Which tensors there are is
agreed on by a small gather, until all ranks keep something for every parameter: from then on nothing changes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.comm.objects import all_gather_object

__all__ = ["StateAverage"]

_CHUNK_BYTES = 32 * 2**20


class _Entry(NamedTuple):
    """One tensor that some rank keeps."""

    parameter: nn.Parameter
    name: str
    shape: torch.Size
    dtype: torch.dtype


class StateAverage:
    """Averages the state of `parameters`, in their order, which is the same on all ranks."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], comm: Communicator
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._comm = comm
        self._entries: list[_Entry] | None = None

    def forget(self) -> None:
        """Agree anew on what there is: the optimizer's state was replaced. All ranks must call."""
        self._entries = None

    @torch.no_grad()
    def average_(self) -> None:
        """Make the tensors the average over ranks. All ranks must call."""
        if self._comm.size == 1:
            return
        with self._comm.traffic.attributed("optimizer state"):
            entries = self._agreed() if self._entries is None else self._entries
            for chunk in _chunks(entries):
                self._average(chunk)

    def _average(self, entries: list[_Entry]) -> None:
        own = [self._optimizer.state.get(entry.parameter, {}).get(entry.name) for entry in entries]
        parts = [
            torch.zeros(entry.shape.numel(), dtype=entry.dtype, device=entry.parameter.device)
            if kept is None
            else kept.reshape(-1)
            for kept, entry in zip(own, entries, strict=True)
        ]
        mean = self._comm.all_reduce(torch.cat(parts), ReduceOp.AVERAGE).wait()
        for kept, part in zip(own, mean.split([part.numel() for part in parts]), strict=True):
            if kept is not None:
                kept.copy_(part.view(kept.shape))

    def _agreed(self) -> list[_Entry]:
        """Return the tensors that any rank keeps. All ranks must call."""
        mine = [self._described(parameter) for parameter in self._parameters]
        views: list[list[dict[str, Any]]] = all_gather_object(self._comm, mine)
        entries = []
        for index, parameter in enumerate(self._parameters):
            names: dict[str, Any] = {}
            for view in views:
                names |= view[index]
            for name, (shape, dtype) in names.items():
                entries.append(_Entry(parameter, name, torch.Size(shape), getattr(torch, dtype)))
        if all(view == views[0] for view in views) and all(mine):
            self._entries = entries
        return entries

    def _described(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {
            name: (list(kept.shape), str(kept.dtype).removeprefix("torch."))
            for name, kept in self._optimizer.state.get(parameter, {}).items()
            if name != "step" and isinstance(kept, Tensor) and kept.is_floating_point()
        }


def _chunks(entries: list[_Entry]) -> Iterator[list[_Entry]]:
    """Group entries of one dtype and device that follow one another, up to a bounded size."""
    chunk: list[_Entry] = []
    size_bytes = 0
    for entry in entries:
        alike = not chunk or (chunk[0].dtype is entry.dtype and chunk[0].parameter.device == entry.parameter.device)
        if not alike or size_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, size_bytes = [], 0
        chunk.append(entry)
        size_bytes += entry.shape.numel() * entry.dtype.itemsize
    if chunk:
        yield chunk
