"""Small nets that together hold every kind of Program op, with inputs of real numbers, ids and truth values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import to_program
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.program import Program
from tests.models import Written, calibrated, lively, model

INT16 = get_default_qconfig("int16")


class WrittenForTwo(Written):
    """:class:`tests.models.Written` with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.body(self, x, y)


def model_of_two(body: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> nn.Module:
    return lively(WrittenForTwo(body, **parts)).eval()


@dataclass(frozen=True)
class Net:
    """A net, its inputs (batch 3), the kinds it is here for, and nodes that need int16."""

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    kinds: frozenset[str]
    wide: tuple[str, ...] = ()

    def prepared(self) -> FakeQuantModel:
        torch.manual_seed(0)
        rules = {"module_name": dict.fromkeys(self.wide, INT16)} if self.wide else None
        return calibrated(self.make(), *self.inputs, qconfig_dict=rules)

    def program(self) -> Program:
        return to_program(self.prepared())


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


ROWS = torch.randn(3, 6, 8, generator=_rng())
IMAGE = torch.randn(3, 4, 6, 8, generator=_rng())
VOLUME = torch.randn(3, 2, 4, 5, 6, generator=_rng())
IDS = torch.randint(0, 6, (3, 5), generator=_rng())
MASK = torch.rand(3, 6, 8, generator=_rng()) > 0.4
GRID = torch.rand(3, 5, 7, 2, generator=_rng()) * 2 - 1


def _net(make: Callable[[], nn.Module], *inputs: Tensor, kinds: str, wide: tuple[str, ...] = ()) -> Net:
    return Net(make, inputs, frozenset(kinds.split()), wide)


def _decoder() -> nn.Module:
    return model(
        lambda s, x: s.up(F.leaky_relu(s.down(x), 0.1)),
        down=nn.Conv3d(2, 4, 3, padding=1),
        up=nn.ConvTranspose3d(4, 2, 2, stride=2),
    )


def _constants(s: Any, x: Tensor) -> Tensor:
    """A position code that each sample adds, a scalar on either side, a constant grown to the batch."""
    start = s.start.expand(x.shape[0], 1, 8)
    return torch.cat([start, 2.5 - (x + s.position) * 0.5], 1)


def _attention() -> nn.Module:
    return model(lambda s, x: s.attention(x, x, x)[0], attention=nn.MultiheadAttention(8, 2, batch_first=True))


def _block() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return model(lambda s, x: s.layer(x), layer=layer)


NETS: dict[str, Net] = {
    "encoder and decoder": _net(
        lambda: model(
            lambda s, x: s.out(s.up(torch.relu(s.down(x)))),
            down=nn.Conv2d(4, 8, 3, stride=2, padding=1),
            up=nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
            out=nn.Conv2d(4, 2, 1),
        ),
        IMAGE,
        kinds="conv conv_transpose",
    ),
    "five axes": _net(_decoder, VOLUME, kinds="conv conv_transpose prelu"),
    "attention": _net(_attention, ROWS, kinds="linear matmul amax add table sum mul reshape permute"),
    "transformer block": _net(_block, ROWS, kinds="linear matmul table mul"),
    "constants": _net(
        lambda: model(
            _constants, start=nn.Parameter(torch.randn(1, 1, 8)), position=nn.Parameter(torch.randn(1, 6, 8))
        ),
        ROWS,
        kinds="constant expand add mul cat",
    ),
    "embedding of ids": _net(
        lambda: model(
            lambda s, x: s.out(s.table(x) + s.position),
            table=nn.Embedding(6, 8),
            out=nn.Linear(8, 3),
            position=nn.Parameter(torch.randn(5, 8)),
        ),
        IDS,
        kinds="embedding constant add linear",
    ),
    "arithmetic of ids": _net(
        lambda: model_of_two(
            lambda s, x, ids: (
                torch.gather(x, 1, (5 - ids).abs().clamp(0, 5).unsqueeze(-1).expand(-1, -1, 8)),
                -ids,
                torch.maximum(ids * 2, ids + 3),
            )
        ),
        ROWS,
        IDS,
        kinds="gather add abs clamp expand neg mul maximum",
    ),
    "masks": _net(
        lambda: model_of_two(
            lambda s, x, mask: (
                x.masked_fill(mask & (x > 0.2), -1.0),
                torch.where(~mask | (x <= 0), x, x.abs()),
                (x > x.amin(-1, keepdim=True)).float().mean(-1),
                mask.sum(-1),
            )
        ),
        ROWS,
        MASK,
        kinds="compare logical where abs amin cast sum",
    ),
    "positions": _net(
        lambda: model(lambda s, x: (x.argmax(-1), x.argmin(1), *torch.topk(x, 3, -1), x.sort(-1).values)),
        ROWS,
        kinds="argmax argmin topk gather",
    ),
    "movement": _net(
        lambda: model(
            lambda s, x: torch.minimum(
                F.pad(torch.roll(x, 2, -1).flip(1), (1, 3))[:, 1:, ::2], -x[:, :5, :6]
            ).transpose(1, 2)
        ),
        ROWS,
        kinds="pad take slice minimum neg permute",
    ),
    "merged with the batch": _net(
        lambda: model(lambda s, x: s.out(x.reshape(-1, 8)).softmax(-1), out=nn.Linear(8, 5)),
        ROWS,
        kinds="reshape linear amax table",
    ),
    "image pyramid": _net(
        lambda: model(
            lambda s, x: torch.cat(
                [
                    F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="nearest"),
                    F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear", align_corners=False),
                    F.interpolate(F.adaptive_avg_pool2d(x, (4, 3)), size=x.shape[2:], mode="bicubic"),
                    F.interpolate(F.adaptive_max_pool2d(x, (4, 3)), size=x.shape[2:], mode="nearest"),
                ],
                1,
            )
        ),
        IMAGE,
        kinds="max_pool avg_pool adaptive_avg_pool adaptive_max_pool resize_nearest resize_linear cat",
    ),
    "warp": _net(
        lambda: model_of_two(lambda s, x, grid: F.grid_sample(x, grid, align_corners=False)),
        IMAGE,
        GRID,
        kinds="grid_sample",
        wide=("y",),
    ),
    "gru": _net(
        lambda: model(lambda s, x: s.gru(x)[0], gru=nn.GRU(8, 4, batch_first=True)),
        ROWS,
        kinds="linear table mul add slice cat",
    ),
}
