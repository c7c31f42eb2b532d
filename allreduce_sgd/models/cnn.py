"""A small convolutional network in the manner of Caffe's CIFAR10-quick (Jia 2014; Krizhevsky's cuda-convnet).

Three times 5x5 convolution and 3x3 pooling with stride 2 (maximum, then twice average), then 64 units and the outputs.
Differences: pooling is padded, so that images of any size fit, PyTorch's default initialisation replaces Gaussians of
hand-set deviation, and biases learn at the same rate as weights. As in the original, no ReLU follows the 64 units.
"""

from torch import nn

__all__ = ["cnn"]

_WIDTH = 64
_POOLINGS = 3


def cnn(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Images (n, c, h, w) float32, with `input_shape` (c, h, w), to outputs (n, outputs) float32."""
    channels, height, width = input_shape
    for _ in range(_POOLINGS):
        height, width = (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        nn.Flatten(),
        nn.Linear(64 * height * width, _WIDTH),
        nn.Linear(_WIDTH, outputs),
    )
