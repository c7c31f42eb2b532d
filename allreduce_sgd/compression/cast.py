"""Narrower floats: float16 or bfloat16 on the wire, added up in float32 (float64 for signals of float64).

Bytes per rank, n those of a float32 signal: (P-1) n/2 for P ≤ 2, 2(P-1)/P n/2 beyond, half an all-reduce (see
`quantized`). Work at P = 2: three casts and an addition. Works on the CPU for both.

Every rank's signal is rounded once, and for P > 2 the sum once more, to nearest; PyTorch's hooks let the sum be
rounded at every addition, and refuse bfloat16 on the CPU. Beyond 65504 float16 is infinite, in a signal or in a sum,
and u shows it, which a gradient scaler takes for the overflow that it is; below 6e-8 it is zero, which error feedback
makes up for. bfloat16 has the range of float32.
"""

import torch
from torch import Tensor

from allreduce_sgd.compression.quantized import Quantizer

__all__ = ["Cast"]


class Cast(Quantizer):
    """Rounds every element to `dtype`, to nearest. Keeps nothing."""

    shifts_error = False

    def __init__(self, dtype: torch.dtype) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, allowed are floating-point dtypes such as torch.bfloat16")
        self._dtype = dtype

    def row(self, length: int) -> tuple[int, int]:
        return length, length * self._dtype.itemsize

    def encode(self, values: Tensor, wire: Tensor, length: int) -> None:
        wire.view(self._dtype).copy_(values)

    def decode(self, wire: Tensor, values: Tensor) -> None:
        values.copy_(wire.view(self._dtype))
