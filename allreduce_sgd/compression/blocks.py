"""Rows cut into blocks of equal width, each with a scale of its own, so that one large element coarsens only its block.

On the wire a row is its blocks' scales (float32), then their elements, filled up to whole words of four bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Blocks", "split"]

_WORD_BYTES = 4


@dataclass(frozen=True)
class Blocks:
    """How a row is cut: `count` blocks of `width` elements."""

    count: int
    width: int

    @classmethod
    def of(cls, length: int, block: int, per_byte: int) -> "Blocks":
        """Return the fewest blocks of at most `block` elements that hold `length`, whole bytes of `per_byte` elements.

        The width is the smallest possible. Blocks of `length` = count * width elements are the same again. Raises
        ValueError where `block` is not a multiple of `per_byte`.
        """
        if block < 1 or block % per_byte:
            raise ValueError(f"block is {block} elements, allowed are multiples of {per_byte}")
        count = max(1, -(-length // block))
        width = -(-length // count)
        return cls(count, -(-width // per_byte) * per_byte)

    @property
    def elements(self) -> int:
        return self.count * self.width

    def wire_bytes(self, per_byte: int) -> int:
        """Return the bytes of a row that has `per_byte` elements in a byte."""
        n_bytes = self.count * _WORD_BYTES + self.elements // per_byte
        return -(-n_bytes // _WORD_BYTES) * _WORD_BYTES


def split(wire: Tensor, blocks: Blocks, per_byte: int) -> tuple[Tensor, Tensor]:
    """Return views of the scales, float32 of shape (rows, count, 1), and of the elements, uint8 of (rows, bytes)."""
    start = blocks.count * _WORD_BYTES
    scales = wire[:, :start].view(torch.float32).unsqueeze(-1)
    return scales, wire[:, start : start + blocks.elements // per_byte]
