"""Every codec by name, as tests make them, and what error feedback's law means for each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from allreduce_sgd.compression.base import Codec
from allreduce_sgd.compression.cast import Cast
from allreduce_sgd.compression.density import Density
from allreduce_sgd.compression.dgc import DeepGradientCompression
from allreduce_sgd.compression.identity import Identity
from allreduce_sgd.compression.int8 import Int8
from allreduce_sgd.compression.powersgd import PowerSGD
from allreduce_sgd.compression.quantized import Quantized
from allreduce_sgd.compression.random_k import RandomK
from allreduce_sgd.compression.sign import Sign
from allreduce_sgd.compression.top_k import TopK

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def slots(length: int) -> list[Tensor]:
    """A matrix with a third of the elements or more, where there are as many as 12, and a vector with the others."""
    columns = int((length // 2) ** 0.5)
    rows = columns if columns > 2 else 0
    return [torch.empty(rows, columns), torch.empty(length - rows * columns)]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[int, int], Codec]
    """(length of the signal, rank) -> a new codec."""
    exact: bool
    """Whether error feedback's law holds bit for bit."""


CASES = [
    Case("identity", lambda length, rank: Identity(), True),
    Case("fp16", lambda length, rank: Quantized(Cast(torch.float16)), True),
    Case("bf16", lambda length, rank: Quantized(Cast(torch.bfloat16)), True),
    Case("int8", lambda length, rank: Quantized(Int8((3, rank), 64)), False),
    Case("sign", lambda length, rank: Quantized(Sign(64)), False),
    Case("top-k", lambda length, rank: TopK(Density(0.05, warmup_steps=6)), True),
    Case("random-k", lambda length, rank: RandomK(Density(0.1), (5,)), True),
    Case("powersgd", lambda length, rank: PowerSGD(slots(length), 2, (7,)), False),
]
DGC = Case("dgc", lambda length, rank: DeepGradientCompression(Density(0.05, warmup_steps=6)), True)


def randn(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers over three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-3, 0, max(length, 1), dtype=torch.float64)[:length]
    return (torch.randn(length, generator=generator, dtype=torch.float64) * scales).to(dtype)


def assert_law(sent: Tensor, residual: Tensor, carried: Tensor, exact: bool) -> None:
    """sent + residual == carried, bit for bit or to one unit in the last place of the largest of the three."""
    if exact:
        assert torch.equal(sent + residual, carried)
        return
    largest = torch.stack([sent.abs(), residual.abs(), carried.abs()]).amax(0).double()
    ulp = torch.finfo(carried.dtype).eps * torch.exp2(torch.floor(torch.log2(largest)))
    assert bool(((sent.double() + residual.double() - carried.double()).abs() <= ulp).all())
