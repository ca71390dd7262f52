"""One small network in its three forms: float, fake-quant, integer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatlib.conversion import IntegerModel, convert_fx
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import prepare_qat_fx


class Net(nn.Module):
    """Convolutions with batch norm, a fused add, a cat with a narrow branch, pooling, a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.block(x) + x)
        return self.fc(self.pool(torch.cat([y, self.side(y)], 1)).flatten(1))


@dataclass(frozen=True)
class Trio:
    float_model: Net
    fake: FakeQuantModel
    integer: IntegerModel
    batches: tuple[Tensor, ...]


def quantized(model: nn.Module, batches: tuple[Tensor, ...]) -> FakeQuantModel:
    fake = prepare_qat_fx(model, example_inputs=(batches[0],))
    calibrate(fake, batches)
    return fake


def build_trio() -> Trio:
    torch.manual_seed(0)
    model = Net().eval()
    batches = tuple(torch.randn(4, 3, 8, 8).clamp(-1, 1) for _ in range(3))
    fake = quantized(model, batches)
    return Trio(model, fake, convert_fx(fake), batches)
