"""Samples of few features each, of which some have many more than others.

In memory they stand one after another, so that a single long one does not lengthen all; a batch is padded to its own
longest. A batch has the encoding of `sparse.py`, pairs of index and value. Every sample has one more feature, the
constant 1, by which a linear model gets a bias, and padding is that feature with the value 0, so that it makes no rows
of a gradient that were not there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SparseSplit"]


@dataclass(frozen=True, eq=False)
class SparseSplit:
    """n samples: the features of sample i are `features[offsets[i] : offsets[i + 1]]`, int64, ascending.

    `values` are theirs, float32; `targets` are (n,). Features are less than `constant`, which is the index of the
    constant one; `longest` is the most that a sample of the data set has.
    """

    offsets: Tensor
    features: Tensor
    values: Tensor
    targets: Tensor
    constant: int
    longest: int

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs (k, m + 1, 2) float32 and targets (k,) of `indices` (k,) int64; k may be 0.

        m is the most features of a sample of the batch, and `longest` where k is 0.
        """
        first, last = self.offsets[indices], self.offsets[indices + 1]
        width = int((last - first).max()) if len(indices) else self.longest
        inputs = torch.zeros(len(indices), width + 1, 2)
        inputs[:, :, 0] = self.constant
        inputs[:, 0, 1] = 1
        positions = first[:, None] + torch.arange(width)
        there = positions < last[:, None]
        inputs[:, 1:, 0][there] = self.features[positions[there]].float()
        inputs[:, 1:, 1][there] = self.values[positions[there]]
        return inputs, self.targets[indices]

    def selected(self, mask: Tensor) -> "SparseSplit":
        """Those samples of which `mask` (n,) bool is true."""
        lengths = self.offsets.diff()
        entries = mask.repeat_interleave(lengths)
        offsets = torch.cat([self.offsets[:1], lengths[mask].cumsum(0)])
        return SparseSplit(
            offsets, self.features[entries], self.values[entries], self.targets[mask], self.constant, self.longest
        )
