"""A multi-layer perceptron with ReLU, initialised after He et al. 2015 (weights) and with zero biases.

Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) stands between a layer and its ReLU, dropout after that.
"""

import math
from collections.abc import Sequence

from torch import nn

from allreduce_sgd.errors import ConfigError

__all__ = ["mlp", "parse_hidden"]


def parse_hidden(text: str) -> tuple[int, ...]:
    """The widths in `text`, such as "512,512".

    Raises:
        ConfigError: it is no list of positive integers.
    """
    widths = text.split(",")
    if not all(width.strip().isascii() and width.strip().isdigit() and 0 < int(width) < 1 << 24 for width in widths):
        raise ConfigError(f"--hidden {text}: expected positive integers separated by commas, as in 512,512")
    return tuple(map(int, widths))


def mlp(
    input_shape: tuple[int, ...], outputs: int, hidden: Sequence[int], dropout: float, batch_norm: bool = False
) -> nn.Module:
    """Inputs (n, *input_shape) float32 to outputs (n, outputs) float32, through layers of the widths `hidden`."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(input_shape)
    for next_width in hidden:
        layer = nn.Linear(width, next_width)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.BatchNorm1d(next_width), nn.ReLU()] if batch_norm else [layer, nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        width = next_width
    return nn.Sequential(*layers, nn.Linear(width, outputs))
