"""The linear model: one layer from the flattened inputs to the outputs.

With the logistic loss it is logistic regression, with the perceptron loss Rosenblatt's perceptron (1958), trained here
on mini-batches. Weights begin at zero, as the problem is convex (and for the perceptron as published).
"""

import math

from torch import nn

__all__ = ["linear"]


def linear(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Inputs (n, *input_shape) float32 to outputs (n, outputs) float32."""
    layer = nn.Linear(math.prod(input_shape), outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)
