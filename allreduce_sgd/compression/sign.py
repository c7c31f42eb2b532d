"""One bit per element: its sign, and a scale per block, the mean magnitude.

signSGD (Bernstein et al., ICML 2018, arXiv 1802.04434) with the scale that makes error feedback converge (Karimireddy
et al., ICML 2019, arXiv 1901.09847), in blocks and in both directions (Zheng, Huang and Kwok, NeurIPS 2019, arXiv
1905.10936). Without error feedback it is biased, a majority vote of scaled signs, and may not converge.

Bytes per rank, n those of a float32 signal and b the elements of a block: c = n/32 (1 + 32/b), gathered (P-1) c for
P ≤ 2, in two phases 2(P-1)/P c beyond (see `quantized`).

Differences from the papers: blocks are cut regardless of layers; the sum's sign and scale are its owner's, whose error
goes to its own residual instead of a second one.
"""

import torch
from torch import Tensor

from allreduce_sgd.compression.bits import pack, unpack
from allreduce_sgd.compression.blocks import Blocks, split
from allreduce_sgd.compression.quantized import Quantizer
from allreduce_sgd.compression.workspace import Workspace

__all__ = ["Sign"]

_PER_BYTE = 8


class Sign(Quantizer):
    """Sends +scale for an element of zero or more, else -scale. Keeps nothing.

    A block of zeros arrives as zeros, one with NaN or infinity as NaN or infinity.
    """

    shifts_error = True

    def __init__(self, block: int = 256) -> None:
        self._block = block
        self._workspace = Workspace()
        self._known_counts: dict[tuple[torch.Size, int], Tensor] = {}

    def row(self, length: int) -> tuple[int, int]:
        blocks = Blocks.of(length, self._block, _PER_BYTE)
        return blocks.elements, blocks.wire_bytes(_PER_BYTE)

    def encode(self, values: Tensor, wire: Tensor, length: int) -> None:
        blocks = Blocks.of(values.shape[1], self._block, _PER_BYTE)
        scales, packed = split(wire, blocks, _PER_BYTE)
        magnitudes = torch.abs(values, out=self._workspace.like("magnitudes", values))
        sums = magnitudes.view(-1, blocks.count, blocks.width).sum(-1, keepdim=True)
        scales.copy_(sums.div_(self._counts(sums, blocks.width, length)))
        pack(values, packed)

    def decode(self, wire: Tensor, values: Tensor) -> None:
        blocks = Blocks.of(values.shape[1], self._block, _PER_BYTE)
        scales, packed = split(wire, blocks, _PER_BYTE)
        unpack(packed, values)
        values.view(-1, blocks.count, blocks.width).mul_(2 * scales).sub_(scales)

    def _counts(self, sums: Tensor, width: int, length: int) -> Tensor:
        """Return how many of `length` elements each block has, one where it has none, in the shape of `sums`."""
        counts = self._known_counts.get((sums.shape, length))
        if counts is None:
            starts = torch.arange(0, sums.numel() * width, width, device=sums.device)
            counts = (length - starts).clamp_(1, width).view(sums.shape).to(sums.dtype)
            self._known_counts[sums.shape, length] = counts
        return counts
