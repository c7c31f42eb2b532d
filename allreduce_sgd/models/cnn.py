"""A small convolutional network in the manner of Caffe's CIFAR10-quick (Jia 2014; Krizhevsky's cuda-convnet).

Three times 5x5 convolution and 3x3 pooling with stride 2 (maximum, then twice average), then 64 units and the outputs.
Differences: pooling is padded, so that images of any size fit, PyTorch's default initialisation replaces Gaussians of
hand-set deviation, and biases learn at the same rate as weights. As in the original, no ReLU follows the 64 units.

On demand with batch normalisation after each convolution and after the 64 units (Ioffe and Szegedy 2015, arXiv
1502.03167), and with dropout before both fully connected layers (Srivastava et al., JMLR 2014).
"""

from torch import nn

__all__ = ["cnn"]

_WIDTH = 64
_POOLINGS = 3


def cnn(input_shape: tuple[int, ...], outputs: int, dropout: float = 0.0, batch_norm: bool = False) -> nn.Module:
    """Images (n, c, h, w) float32, with `input_shape` (c, h, w), to outputs (n, outputs) float32."""
    channels, height, width = input_shape
    for _ in range(_POOLINGS):
        height, width = (height + 1) // 2, (width + 1) // 2

    # Without layers that do nothing, so that the others keep their names in checkpoints.
    def dropped() -> list[nn.Module]:
        return [nn.Dropout(dropout)] if dropout > 0 else []

    def normalised(layer: nn.Module, width: int) -> list[nn.Module]:
        norm = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
        return [layer, norm(width)] if batch_norm else [layer]

    return nn.Sequential(
        *normalised(nn.Conv2d(channels, 32, 5, padding=2), 32),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.ReLU(),
        *normalised(nn.Conv2d(32, 32, 5, padding=2), 32),
        nn.ReLU(),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        *normalised(nn.Conv2d(32, 64, 5, padding=2), 64),
        nn.ReLU(),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        nn.Flatten(),
        *dropped(),
        *normalised(nn.Linear(64 * height * width, _WIDTH), _WIDTH),
        *dropped(),
        nn.Linear(_WIDTH, outputs),
    )
