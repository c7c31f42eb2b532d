"""Tensors that a codec uses again in every step, so that a step allocates nothing of the signal's size."""

import torch
from torch import Tensor

__all__ = ["Workspace"]


class Workspace:
    """Tensors by name, shape, dtype and device, made when they are first asked for and kept."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor of this name and kind. A new one is zeroed, an old one holds what was left in it."""
        key = (name, shape, dtype, device)
        kept = self._tensors.get(key)
        if kept is None:
            kept = self._tensors[key] = torch.zeros(shape, dtype=dtype, device=device)
        return kept

    def like(self, name: str, other: Tensor) -> Tensor:
        """Return the tensor of this name, with the shape, dtype and device of `other`."""
        return self.take(name, tuple(other.shape), other.dtype, other.device)
