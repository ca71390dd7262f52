"""Small models that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import prepare_qat_fx


class Written(nn.Module):
    """A model whose forward is a function of (itself, inputs); submodules and parameters come as keywords."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def model(body: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> nn.Module:
    """:class:`Written`, in eval mode, its batch norms with statistics and weights that do something."""
    return lively(Written(body, **parts)).eval()


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and weights away from (0, 1), some weights negative."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and part.track_running_stats:
            shape = part.running_mean.shape
            part.running_mean.copy_(torch.randn(shape, generator=generator))
            part.running_var.copy_(torch.rand(shape, generator=generator) * 2 + 0.3)
            with torch.no_grad():
                part.weight.copy_(torch.randn(shape, generator=generator) + 0.5)
                part.bias.copy_(torch.randn(shape, generator=generator))
    return module


class Block(nn.Module):
    """conv-bn-add-relu6, the residual of MobileNetV2 and ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


class Everything(nn.Module):
    """Every rounding operator once. Input ``[N, 3, 16, 16]``, output ``[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.alone = nn.BatchNorm2d(8)
        self.smooth = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.shrink = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.pool = nn.AdaptiveAvgPool2d(5)
        self.hidden = nn.Linear(16 * 25, 64)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.block(x)
        z = self.smooth(self.bn(self.depthwise(y)))
        mixed = torch.cat([self.alone(y + z), z], 1)
        flat = self.pool(self.shrink(mixed)).view(x.size(0), -1)
        return self.head(self.drop(F.relu(self.hidden(flat))))


class Tiny(nn.Module):
    """Two layers to train on ``[N, 2]``, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(x)))


def everything(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lively(Everything(), seed).eval()


def images(batch: int = 4, channels: int = 3, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def calibrated(module: nn.Module, *inputs: Tensor, **options: Any) -> FakeQuantModel:
    """``module`` prepared and calibrated on one batch; ``options`` go to ``prepare_qat_fx``."""
    prepared = prepare_qat_fx(module, example_inputs=inputs, **options)
    calibrate(prepared, [(list(inputs), None)])
    return prepared
