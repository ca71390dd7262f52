"""Entry point of the model: a spatial transformer before a small CNN.

Jaderberg et al., Spatial Transformer Networks, 2015: a localisation network sees the image and gives the affine map
through which the classifier is to look at it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build(width: int = 16, classes: int = 10) -> nn.Module:
    """The untrained network: images ``[N, 1, 28, 28]`` to scores ``[N, classes]``; ``width`` scales all channels."""
    return WarpNet(width, classes)


class WarpNet(nn.Module):
    """Localisation to theta ``[N, 2, 3]``, grid ``[N, 28, 28, 2]``, sampling, classification."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.localise = Localisation(width)
        self.features = nn.Sequential(
            _conv_bn(1, width, stride=2),
            _conv_bn(width, 2 * width),
            _conv_bn(2 * width, 3 * width, stride=2),
            _conv_bn(3 * width, 3 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.localise(x), x.size(), align_corners=False)  # type: ignore[arg-type]
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return self.head(self.features(x))  # type: ignore[no-any-return]


class Localisation(nn.Module):
    """Three convolutions to 4×4 and two linear layers; starts as the identity map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_bn(1, width // 2, stride=2),
            _conv_bn(width // 2, width, stride=2),
            _conv_bn(width, 2 * width, stride=2),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, 2 * width),
            nn.ReLU(),
        )
        self.theta = nn.Linear(2 * width, 6)
        nn.init.zeros_(self.theta.weight)
        with torch.no_grad():
            self.theta.bias.copy_(torch.eye(2, 3).flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.theta(self.features(x)).reshape(-1, 2, 3)  # type: ignore[no-any-return]


def _conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
