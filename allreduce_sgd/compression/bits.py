"""Signs as bits, eight elements to a byte, the first one in the highest bit."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(values: Tensor, packed: Tensor) -> None:
    """Write a 1 for every element that is zero or more, else (NaN too) a 0.

    `values` has shape (rows, 8 k), contiguous, float32 or float64, `packed` is uint8 of shape (rows, k).
    """
    if values.device.type == "cpu":
        packed.copy_(torch.from_numpy(np.packbits(np.greater_equal(values.numpy(), 0), axis=-1)))
    else:
        weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=values.device)
        ones = torch.ge(values, 0).view(*packed.shape, 8)
        packed.copy_(torch.where(ones, weights, 0).sum(-1, dtype=torch.uint8))


def unpack(packed: Tensor, values: Tensor) -> None:
    """Write what `pack` wrote as 0.0 and 1.0; shapes and dtypes are those of `pack`."""
    if packed.device.type == "cpu":
        values.copy_(torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)))
    else:
        shifts = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8, device=packed.device)
        values.copy_(packed.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1).view(values.shape))
