"""Residual networks (He, Zhang, Ren, Sun 2015, "Deep Residual Learning") in their forms for small images.

`resnet20` is the paper's network for CIFAR-10: three stages of three blocks with 16, 32 and 64 channels, shortcuts
without parameters (option A). `resnet18` has the paper's ImageNet stages of two blocks with 64 to 512 channels, with
two differences for small images: a 3x3 stem of stride 1, and no max pooling; its shortcuts are projections (option B).

Batch normalisation needs more than one value per channel while training, so a batch of a single image fails where the
last stage has shrunk to one pixel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ResNet", "resnet18", "resnet20"]


class _Subsample(nn.Module):
    """Option A: every second pixel, and zeros for the channels that are added."""

    def __init__(self, added_channels: int, stride: int) -> None:
        super().__init__()
        self.added_channels = added_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))


def _projection(channels: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = _projection(channels, width, stride) if project else _Subsample(width - channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """Images (n, c, h, w) float32 to outputs (n, outputs) float32."""

    def __init__(self, channels: int, outputs: int, widths: Sequence[int], blocks: int, project: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        before = widths[0]
        for width in widths:
            for block in range(blocks):
                stride = 2 if block == 0 and width != widths[0] else 1
                stages.append(_Block(before, width, stride, project))
                before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.mean(self.stages(self.stem(images)), (2, 3)))
        return outputs


def resnet20(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The paper's CIFAR network of 20 layers, 0.27 million parameters; `input_shape` is (c, h, w)."""
    return ResNet(input_shape[0], outputs, (16, 32, 64), 3, project=False)


def resnet18(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """18 layers for small images, 11 million parameters; `input_shape` is (c, h, w)."""
    return ResNet(input_shape[0], outputs, (64, 128, 256, 512), 2, project=True)
