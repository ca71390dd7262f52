"""A net with every kind of layer that is corrected, and what it is calibrated and judged on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import prepare_qat_fx
from tests.models import images, model

SEEN = (images(96, seed=1) + 0.5).split(32)
HELD_OUT = images(64, seed=2) + 0.5


def layered() -> nn.Module:
    """conv-bn-relu, depthwise, conv-bn-add-relu, transposed conv, linear; in one net."""
    torch.manual_seed(4)

    def body(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.stem_bn(s.stem(x)))
        x = F.relu(s.second_bn(s.second(F.relu(s.each(x)))) + x)
        return s.head(F.adaptive_avg_pool2d(F.leaky_relu(s.up(x), 0.1), 2).flatten(1))

    return model(
        body,
        stem=nn.Conv2d(3, 8, 3, bias=False),
        stem_bn=nn.BatchNorm2d(8),
        each=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        second=nn.Conv2d(8, 8, 3, padding=1, bias=False),
        second_bn=nn.BatchNorm2d(8),
        up=nn.ConvTranspose2d(8, 6, 2, stride=2),
        head=nn.Linear(24, 5),
    )


LAYERS = ["stem", "each", "second", "up", "head"]


def prepared(net: nn.Module | None = None, **options: Any) -> FakeQuantModel:
    """Calibrated on :data:`SEEN`."""
    fake = prepare_qat_fx(net or layered(), example_inputs=(SEEN[0][:1],), **options)
    calibrate(fake, SEEN)
    return fake


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.detach().double(), other.detach().double()
    return float(10 * torch.log10(reference.square().mean() / (reference - other).square().mean()))
