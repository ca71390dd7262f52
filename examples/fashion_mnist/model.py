"""Entry point of the model: a compact CNN of the structures that accelerators are given."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def build(width: int = 16, classes: int = 10) -> nn.Module:
    """The untrained network: images ``[N, 1, 28, 28]`` to scores ``[N, classes]``; 35,898 parameters by default.

    ``width`` is the number of channels after the stem; the later blocks have multiples of it.
    """
    return FashionNet(width, classes)


class FashionNet(nn.Module):
    """Stem, inverted residual, residual, three branches, average, linear; maps of 14×14, then of 7×7."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = _conv_bn(1, width, 3, nn.ReLU(), stride=2)
        self.inverted = InvertedResidual(width, 2 * width)
        self.down = _conv_bn(width, 2 * width, 3, nn.ReLU(), stride=2)
        self.residual = Residual(2 * width)
        self.branches = Branches(2 * width, width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inverted(self.stem(x))
        x = self.residual(self.down(x))
        x = self.branches(x)
        return self.head(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """1×1 to ``hidden`` channels, 3×3 on each channel, 1×1 back, added to the input."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = _conv_bn(channels, hidden, 1, nn.ReLU6())
        self.depthwise = _conv_bn(hidden, hidden, 3, nn.ReLU6(), groups=hidden)
        self.project = _conv_bn(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two 3×3 convolutions; the input is added before the second activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv_bn(channels, channels, 3, nn.ReLU())
        self.second = _conv_bn(channels, channels, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + x)  # type: ignore[no-any-return]


class Branches(nn.Module):
    """1×1, 3×3, and max pool with 1×1, side by side: ``4 * unit`` channels out."""

    def __init__(self, channels: int, unit: int) -> None:
        super().__init__()
        self.point = _conv_bn(channels, unit, 1, nn.ReLU())
        self.area = _conv_bn(channels, 2 * unit, 3, nn.ReLU())
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.pooled = _conv_bn(channels, unit, 1, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.area(x), self.pooled(self.pool(x))], dim=1)


def _conv_bn(
    inputs: int, outputs: int, kernel: int, activation: nn.Module | None = None, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(outputs),
    )
    if activation is not None:
        layers["act"] = activation
    return nn.Sequential(layers)
