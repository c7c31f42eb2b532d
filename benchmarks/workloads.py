"""What a training step computes: models of different ratios of computing to communicating, on synthetic inputs.

Forward and backward of a fully connected model cost about 6 b n flops for b samples and n parameters, and the
all-reduce moves 2(P-1)/P · 4n bytes per rank: their ratio is 3 b P / (4 (P-1)) flops per byte, so batch 16 is four
times harder to hide than batch 64, whatever the width; the width says whether latency or bandwidth counts. A
convolution uses each parameter at every position, so it computes much and sends little.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from allreduce_sgd.models.cnn import cnn
from allreduce_sgd.models.mlp import mlp

__all__ = ["WORKLOADS", "Workload"]

_CLASSES = 10


@dataclass(frozen=True)
class Workload:
    """A model and the samples per rank and step; `hidden` None is the convolutional network."""

    batch_size: int
    input_shape: tuple[int, ...]
    hidden: tuple[int, ...] | None

    def build(self) -> nn.Module:
        """Return the model at its start, the same at every call and on every rank."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            if self.hidden is None:
                return cnn(self.input_shape, _CLASSES)
            return mlp(self.input_shape, _CLASSES, self.hidden, dropout=0.0)

    def batch(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the inputs (b, *input_shape) float32 and labels (b,) of a rank: the same wherever it is asked for."""
        generator = torch.Generator().manual_seed(1 + rank)
        inputs = torch.randn(self.batch_size, *self.input_shape, generator=generator)
        return inputs, torch.randint(_CLASSES, (self.batch_size,), generator=generator)


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "mlp512-b64": Workload(64, (784,), (512, 512)),
        "mlp512-b16": Workload(16, (784,), (512, 512)),
        "mlp2048-b64": Workload(64, (784,), (2048, 2048)),
        "cnn-b64": Workload(64, (3, 32, 32), None),
    }
)
