"""The trained parameters as flat vectors, cut into shards, and the shard that one server keeps.

Parameters lie end to end in one vector per dtype, in the model's order; shard s of S is chunk s of every vector, so
shards differ by at most one element per vector and need not respect the borders of parameters.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.buckets import Bucket
from allreduce_sgd.gradients.sharded import Groups
from allreduce_sgd.schedules.step import chunk

__all__ = ["Master", "Vectors"]


class Vectors:
    """How the trained parameters of `model` lie in vectors, and in `shards` shards.

    Raises ConfigError where a parameter is not of a real floating-point dtype, or none is trained.
    """

    def __init__(self, model: nn.Module, shards: int) -> None:
        self.shards = shards
        self.parameters: list[nn.Parameter] = []
        kinds: dict[torch.dtype, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if not parameter.is_floating_point():
                raise ConfigError(
                    f"--model: its parameter {name} is of {parameter.dtype}; servers keep real floating-point numbers"
                )
            kinds.setdefault(parameter.dtype, []).append(parameter)
            self.parameters.append(parameter)
        if not kinds:
            raise ConfigError("--model: it has no parameters to train")
        self.members = list(kinds.values())

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [members[0].dtype for members in self.members]

    @property
    def lengths(self) -> list[int]:
        """Elements of each vector."""
        return [sum(member.numel() for member in members) for members in self.members]

    def memory(self) -> list[Bucket]:
        """Return new zeroed vectors on the CPU, with views in the parameters' shapes."""
        return [
            Bucket(members, torch.zeros(length, dtype=dtype))
            for members, length, dtype in zip(self.members, self.lengths, self.dtypes, strict=True)
        ]

    def pieces(self, shard: int) -> list[slice]:
        """Return which elements of each vector the shard has."""
        return [chunk(length, self.shards, shard) for length in self.lengths]

    def piece_memory(self, shard: int) -> list[Tensor]:
        """Return new zeroed tensors on the CPU that hold the shard's part of each vector."""
        return [
            torch.zeros(piece.stop - piece.start, dtype=dtype)
            for piece, dtype in zip(self.pieces(shard), self.dtypes, strict=True)
        ]


class Master:
    """One shard of the parameters with an optimizer of its own, on the CPU.

    `values` and `gradient` are the shard's part of each vector; `step` updates the first in place by the second. The
    optimizer that `make` makes sees whole parameters in their shapes where all of one lies in the shard, else the flat
    part, so it must work element by element where there are several shards.
    """

    def __init__(self, vectors: Vectors, shard: int, make: Callable[[Groups], torch.optim.Optimizer]) -> None:
        self.values = vectors.piece_memory(shard)
        self.gradient = vectors.piece_memory(shard)
        parts: dict[int, nn.Parameter] = {}
        pieces = vectors.pieces(shard)
        for members, piece, values, gradient in zip(vectors.members, pieces, self.values, self.gradient, strict=True):
            start = 0
            for member in members:
                stop = start + member.numel()
                cut = slice(max(start, piece.start) - piece.start, min(stop, piece.stop) - piece.start)
                if cut.start < cut.stop:
                    whole = cut.stop - cut.start == member.numel()
                    part = nn.Parameter(_view(values[cut], member if whole else None))
                    part.grad = _view(gradient[cut], member if whole else None)
                    parts[id(member)] = part
                start = stop
        self.parts = [parts[id(one)] for one in vectors.parameters if id(one) in parts]
        # torch refuses optimizers without parameters, which a server of a small model may have none of.
        self.optimizer = make([{"params": self.parts or [nn.Parameter(torch.zeros(0, 0))]}])

    def step(self, lr: float) -> None:
        """Take the optimizer's step with what `gradient` holds, at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def norm(self) -> Tensor:
        """Return the L2 norm of `gradient`, as torch.nn.utils.clip_grad_norm_ takes it."""
        return nn.utils.get_total_norm([part.grad for part in self.parts if part.grad is not None])

    def clip_(self, norm: Tensor, max_norm: float) -> None:
        """Scale `gradient` down in place, where `norm`, that of all servers' gradients, is above `max_norm`."""
        if self.parts:
            nn.utils.clip_grads_with_norm_(self.parts, max_norm, norm)


def _view(flat: Tensor, shaped: nn.Parameter | None) -> Tensor:
    return flat if shaped is None else Bucket([shaped], flat).slots[0]
