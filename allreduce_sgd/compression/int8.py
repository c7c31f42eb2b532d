"""8-bit integers with a scale per block and stochastic rounding.

After QSGD (Alistarh et al., NeurIPS 2017, arXiv 1610.02132): a block's largest magnitude is 127 steps, and an element
between two steps goes up with the probability of its distance from the lower one, so that the expected value of what
is sent is the signal (to 2^-16 of a step), and no error feedback is needed.

Bytes per rank, n those of a float32 signal and b the elements of a block: c = n/4 (1 + 4/b), gathered (P-1) c for
P ≤ 2, in two phases 2(P-1)/P c beyond (see `quantized`). Integers of all ranks could instead be added up by an
all-reduce, but then need one scale for all and 127/P steps each, too coarse from 16 ranks on.

Differences from the paper: the largest magnitude instead of the 2-norm is the scale, all integers have 8 bits instead
of an entropy code, and for P > 2 the sum is rounded once more, by its owner, stochastically too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.compression.blocks import Blocks, split
from allreduce_sgd.compression.quantized import Quantizer
from allreduce_sgd.compression.seeds import reseed
from allreduce_sgd.compression.workspace import Workspace

__all__ = ["Int8"]

_STEPS = 127
# Below this a float32 has fewer bits; a block that small is sent in steps of this size, mostly as zeros.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Int8(Quantizer):
    """Rounds to multiples of a block's scale. Keeps how often it has drawn random numbers.

    `seed` differs between ranks and buckets, lest they all round up together. A block with NaN or infinity arrives as
    NaN or infinity.
    """

    shifts_error = True

    def __init__(self, seed: tuple[int, ...], block: int = 256) -> None:
        self._seed = seed
        self._block = block
        self._draws = 0
        self._generator: torch.Generator | None = None
        self._workspace = Workspace()

    def row(self, length: int) -> tuple[int, int]:
        blocks = Blocks.of(length, self._block, 1)
        return blocks.elements, blocks.wire_bytes(1)

    def encode(self, values: Tensor, wire: Tensor, length: int) -> None:
        blocks = Blocks.of(values.shape[1], self._block, 1)
        scales, integers = split(wire, blocks, 1)
        steps = torch.abs(values, out=self._workspace.like("steps", values)).view(-1, blocks.count, blocks.width)
        scales.copy_(steps.amax(-1, keepdim=True).div_(_STEPS).clamp_(min=_SMALLEST_SCALE))
        torch.div(values.view(steps.shape), scales, out=steps)
        steps.view(-1).add_(self._noise(steps.numel(), values.device), alpha=2.0**-16)
        integers.view(torch.int8).copy_(steps.round_().view(values.shape))

    def decode(self, wire: Tensor, values: Tensor) -> None:
        blocks = Blocks.of(values.shape[1], self._block, 1)
        scales, integers = split(wire, blocks, 1)
        values.copy_(integers.view(torch.int8))
        values.view(-1, blocks.count, blocks.width).mul_(scales)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": list(self._seed), "draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seed = tuple(state["seed"])
        self._draws = state["draws"]

    def _noise(self, numel: int, device: torch.device) -> Tensor:
        """Return int16 that are uniform over all their values."""
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
        reseed(self._generator, *self._seed, self._draws)
        self._draws += 1
        # Four at a time: drawing random numbers is what costs most here.
        words = self._workspace.take("noise", (-(-numel // 4),), torch.int64, device)
        words.random_(-(2**63), None, generator=self._generator)
        return words.view(torch.int16)[:numel]
