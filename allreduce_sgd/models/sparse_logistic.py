"""Logistic regression on sparse samples, with sparse gradients.

A sample is k pairs of a feature's index and its value (`data/sparse.py`); its scores are the sum of value times the
feature's row of weights. The gradient is that of the rows of a mini-batch's features alone, so that a step costs by the
non-zero values, however many features there are. Weights begin at zero, as the problem is convex. There is no bias,
whose gradient would be dense: a feature of value 1 in every sample is one.
"""

from torch import Tensor, nn

__all__ = ["SparseLogistic"]


class SparseLogistic(nn.Module):
    """Inputs (n, k, 2), pairs of index and value, to outputs (n, outputs), in the dtype of the weights."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.rows = nn.EmbeddingBag(features, outputs, mode="sum", sparse=True)
        nn.init.zeros_(self.rows.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        values = inputs[..., 1].to(self.rows.weight.dtype)
        scores: Tensor = self.rows(inputs[..., 0].long(), per_sample_weights=values)
        return scores
