"""Models as people write them: the block structure of well-known networks, narrow and with random weights.

Nothing here is written for this library: in-place activations, views that take sizes from ``x.shape``, registries of
activations, configuration objects, dicts as outputs, lists built in loops.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.grid_sample import warp
from tests.models import lively


def reals(*shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda rng, batch: torch.randn(batch, *shape, generator=rng)


def unit(*shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda rng, batch: torch.rand(batch, *shape, generator=rng)


def ids(below: int, *shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda rng, batch: torch.randint(0, below, (batch, *shape), generator=rng)


def lengths_mask(length: int, dtype: torch.dtype = torch.int64) -> Callable[[torch.Generator, int], Tensor]:
    """1 for the first positions of each sample, 0 for the rest; at least two positions."""

    def draw(rng: torch.Generator, batch: int) -> Tensor:
        ends = torch.randint(2, length + 1, (batch, 1), generator=rng)
        return (torch.arange(length) < ends).to(dtype)

    return draw


@dataclass(frozen=True)
class Found:
    """A model and how its inputs are drawn.

    ``wide`` are ops that need int16 in any case. ``least_db`` is the SQNR that 16 bits have to reach.
    """

    make: Callable[[], nn.Module]
    draws: tuple[Callable[[torch.Generator, int], Tensor], ...]
    wide: tuple[str, ...] = ()
    least_db: float = 60.0
    slow: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return lively(self.make(), 1).eval()

    def inputs(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        rng = torch.Generator().manual_seed(seed)
        return tuple(draw(rng, batch) for draw in self.draws)


NETS: dict[str, Found] = {}


def found(name: str, *draws: Callable[[torch.Generator, int], Tensor], **options: Any) -> Callable[[Any], Any]:
    """Register a class or function that makes the model called ``name``."""

    def register(make: Any) -> Any:
        NETS[name] = Found(make, draws, **options)
        return make

    return register


# -- image classifiers -------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


@found("resnet", reals(3, 32, 32))
class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(8, 1)
        self.layer2 = self._make_layer(16, 2, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, 10)

    def _make_layer(self, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.inplanes != planes:
            downsample = nn.Sequential(nn.Conv2d(self.inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        layers = [BasicBlock(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes
        layers.extend(BasicBlock(planes, planes) for _ in range(1, blocks))
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def make_divisible(v: float, divisor: int = 8) -> int:
    return max(divisor, int(v + divisor / 2) // divisor * divisor)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, act: Any = nn.ReLU, gate: Any = nn.Hardsigmoid) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, make_divisible(channels // 4), 1)
        self.act = act(inplace=True)
        self.fc2 = nn.Conv2d(make_divisible(channels // 4), channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class ConvBNAct(nn.Sequential):
    def __init__(self, i: int, o: int, k: int = 3, s: int = 1, groups: int = 1, act: Any = nn.Hardswish) -> None:
        layers: list[nn.Module] = [nn.Conv2d(i, o, k, s, (k - 1) // 2, groups=groups, bias=False)]
        layers.append(nn.BatchNorm2d(o, eps=0.001, momentum=0.01))
        if act is not None:
            layers.append(act(inplace=True))
        super().__init__(*layers)


class InvertedResidual(nn.Module):
    def __init__(self, i: int, e: int, o: int, k: int, s: int, se: bool, act: Any, gate: Any = nn.Hardsigmoid) -> None:
        super().__init__()
        self.use_res_connect = s == 1 and i == o
        layers: list[nn.Module] = []
        if e != i:
            layers.append(ConvBNAct(i, e, 1, act=act))
        layers.append(ConvBNAct(e, e, k, s, groups=e, act=act))
        if se:
            layers.append(SqueezeExcite(e, act, gate))
        layers.append(ConvBNAct(e, o, 1, act=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


@found("mobilenet v3", reals(3, 32, 32))
class MobileNetV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvBNAct(3, 8, 3, 2),
            InvertedResidual(8, 8, 8, 3, 1, True, nn.ReLU),
            InvertedResidual(8, 24, 16, 3, 2, False, nn.ReLU),
            InvertedResidual(16, 32, 16, 5, 1, True, nn.Hardswish),
            ConvBNAct(16, 32, 1),
        )
        self.classifier = nn.Sequential(
            nn.Linear(32, 40), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(40, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, 1)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


class StochasticDepth(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1) >= self.p
        return x / (1 - self.p) * keep


class MBConv(nn.Module):
    def __init__(self, i: int, o: int, expand: int, s: int) -> None:
        super().__init__()
        self.expand_conv = nn.Conv2d(i, i * expand, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(i * expand)
        self.dw = nn.Conv2d(i * expand, i * expand, 3, s, 1, groups=i * expand, bias=False)
        self.bn1 = nn.BatchNorm2d(i * expand)
        self.se_reduce = nn.Conv2d(i * expand, 4, 1)
        self.se_expand = nn.Conv2d(4, i * expand, 1)
        self.project = nn.Conv2d(i * expand, o, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.drop = StochasticDepth(0.2)
        self.skip = s == 1 and i == o

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.silu(self.bn0(self.expand_conv(inputs)), inplace=True)
        x = self.bn1(self.dw(x))
        x = x * torch.sigmoid(x)
        s = x.mean((2, 3), keepdim=True)
        s = self.se_expand(F.silu(self.se_reduce(s)))
        x = s.sigmoid() * x
        x = self.bn2(self.project(x))
        return self.drop(x) + inputs if self.skip else x


@found("efficientnet", reals(3, 32, 32))
class EfficientNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(3, 8, 3, 2, 1, bias=False), bn=nn.BatchNorm2d(8), act=nn.SiLU())
        )
        self.blocks = nn.ModuleList([MBConv(8, 8, 2, 1), MBConv(8, 12, 3, 2), MBConv(12, 12, 3, 1)])
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for idx, block in enumerate(self.blocks):
            x = block(x)
            if idx == len(self.blocks) - 1:
                x = F.dropout(x, 0.1, self.training)
        return self.head(x.mean([2, 3]))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleUnit(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        b = oup // 2
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False), nn.BatchNorm2d(inp),
                nn.Conv2d(inp, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
            )  # fmt: skip
        else:
            self.branch1 = nn.Sequential()
        self.branch2 = nn.Sequential(
            nn.Conv2d(inp if stride > 1 else b, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
            nn.Conv2d(b, b, 3, stride, 1, groups=b, bias=False), nn.BatchNorm2d(b),
            nn.Conv2d(b, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


@found("shufflenet v2", reals(3, 24, 24))
def shufflenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.MaxPool2d(3, 2, 1), ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


class GhostModule(nn.Module):
    def __init__(self, inp: int, oup: int, relu: bool = True) -> None:
        super().__init__()
        self.oup = oup
        init = math.ceil(oup / 2)
        self.primary_conv = nn.Sequential(
            nn.Conv2d(inp, init, 1, bias=False),
            nn.BatchNorm2d(init),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(init, init, 3, 1, 1, groups=init, bias=False),
            nn.BatchNorm2d(init),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        out = torch.cat([x1, x2], dim=1)
        return out[:, : self.oup, :, :]


@found("ghostnet", reals(3, 16, 16))
class GhostNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, 2, 1)
        self.ghost1 = GhostModule(9, 15, relu=True)
        self.ghost2 = GhostModule(15, 9, relu=False)
        self.se = nn.Sequential(nn.Conv2d(9, 4, 1), nn.ReLU(), nn.Conv2d(4, 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        residual = x
        x = self.ghost2(self.ghost1(x))
        gate = F.relu6(self.se(F.adaptive_avg_pool2d(x, 1)) + 3.0) / 6.0
        x = x * gate
        x += residual
        return F.avg_pool2d(x, x.size()[2:]).squeeze(-1).squeeze(-1)


class LayerNorm2d(nn.Module):
    """ConvNeXt's own: channels first."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = nn.Parameter(torch.randn(channels) * 0.1)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(0.5 * torch.ones(dim), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        inp = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.norm(x)
        x = self.pwconv2(self.act(self.pwconv1(x)))
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return inp + x


@found("convnext", reals(3, 32, 32), slow=True)
class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8))
        self.stages = nn.Sequential(ConvNeXtBlock(8), LayerNorm2d(8), nn.Conv2d(8, 12, 2, 2), ConvNeXtBlock(12))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.head(self.norm(x.mean([-2, -1])))


# -- segmentation, detection, image to image ---------------------------------------------------------------------------


class DoubleConv(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
            nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, i: int, o: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(i, i, kernel_size=2, stride=2)
        self.conv = DoubleConv(i + o, o)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        diff_y = x2.size()[2] - x1.size()[2]
        diff_x = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 6)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(6, 8))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 10))
        self.up1 = Up(10, 8, bilinear)
        self.up2 = Up(8, 6, bilinear)
        self.outc = nn.Conv2d(6, 2, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return torch.sigmoid(self.outc(x))


found("unet, transposed convolutions", reals(3, 21, 18))(partial(UNet, False))
found("unet, bilinear", reals(3, 21, 18))(partial(UNet, True))


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(c, c), Conv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 2) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Conv(c1, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c // 2), Conv(c * 2, c)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Detect(nn.Module):
    """The decode of YOLOv5: grids and anchors are constants."""

    anchors: Tensor
    strides = (8, 16)

    def __init__(self, channels: tuple[int, ...], nc: int = 3) -> None:
        super().__init__()
        self.nc, self.no, self.na = nc, nc + 5, 2
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in channels)
        self.register_buffer("anchors", torch.tensor([[[10.0, 13], [16, 30]], [[33, 23], [30, 61]]]))

    def _make_grid(self, nx: int, ny: int, i: int) -> tuple[Tensor, Tensor]:
        yv, xv = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
        grid = torch.stack((xv, yv), 2).expand((1, self.na, ny, nx, 2)).float() - 0.5
        return grid, self.anchors[i].view((1, self.na, 1, 1, 2)).expand((1, self.na, ny, nx, 2))

    def forward(self, x: list[Tensor]) -> Tensor:
        z = []
        for i, m in enumerate(self.m):
            y = m(x[i])
            bs, _, ny, nx = y.shape
            y = y.view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            grid, anchor_grid = self._make_grid(nx, ny, i)
            xy, wh, conf = y.sigmoid().split((2, 2, self.nc + 1), 4)
            xy = (xy * 2 + grid) * self.strides[i]
            wh = (wh * 2) ** 2 * anchor_grid
            z.append(torch.cat((xy, wh, conf), 4).view(bs, self.na * nx * ny, self.no))
        return torch.cat(z, 1)


@found("yolo v5", reals(3, 64, 64))
class YOLO(nn.Module):
    def __init__(self, detect: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 8, 3, 4), Conv(8, 8, 3, 2))
        self.c3 = C2f(8, 8)
        self.down = Conv(8, 12, 3, 2)
        self.sppf = SPPF(12)
        self.lateral = Conv(12, 8)
        self.up = nn.Upsample(None, 2, "nearest")
        self.out = C2f(16, 8, 1)
        self.detect = Detect((8, 12))

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.c3(self.stem(x))
        p4 = self.sppf(self.down(p3))
        n3 = self.out(torch.cat([self.up(self.lateral(p4)), p3], 1))
        return self.detect([n3, p4])


class DFL(nn.Module):
    def __init__(self, c1: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)
        self.c1 = c1

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


@found("yolo v8 head", reals(6, 8, 8), reals(6, 4, 4))
class YOLOv8Head(nn.Module):
    """Distances to the sides of a box from a distribution, decoded to corners; classes by sigmoid."""

    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.nc, self.no = nc, nc + 32
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(6, 8, 3), nn.Conv2d(8, 32, 1)) for _ in range(2))
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(6, 8, 3), nn.Conv2d(8, nc, 1)) for _ in range(2))
        self.dfl = DFL()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = [a, b]
        points, strides = [], []
        for i, stride in enumerate((8, 16)):
            h, w = x[i].shape[2:]
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
            sx, sy = torch.arange(w, device=a.device) + 0.5, torch.arange(h, device=a.device) + 0.5
            gy, gx = torch.meshgrid(sy, sx, indexing="ij")
            points.append(torch.stack((gx, gy), -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), float(stride)))
        anchors, stride = torch.cat(points).transpose(0, 1), torch.cat(strides).transpose(0, 1)
        box, cls = torch.cat([xi.view(a.shape[0], self.no, -1) for xi in x], 2).split((32, self.nc), 1)
        lt, rb = self.dfl(box).chunk(2, 1)
        x1y1 = anchors.unsqueeze(0) - lt
        x2y2 = anchors.unsqueeze(0) + rb
        dbox = torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), 1) * stride
        return torch.cat((dbox, cls.sigmoid()), 1)


class FPN(nn.Module):
    def __init__(self, channels: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Conv2d(c, out, 1) for c in channels)
        self.layer_blocks = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in channels)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, values = list(x.keys()), list(x.values())
        last_inner = self.inner_blocks[-1](values[-1])
        results = [self.layer_blocks[-1](last_inner)]
        for idx in range(len(values) - 2, -1, -1):
            inner_lateral = self.inner_blocks[idx](values[idx])
            feat_shape = inner_lateral.shape[-2:]
            inner_top_down = F.interpolate(last_inner, size=feat_shape, mode="nearest")
            last_inner = inner_lateral + inner_top_down
            results.insert(0, self.layer_blocks[idx](last_inner))
        return OrderedDict(zip(names, results, strict=True))


@found("retinanet with shared heads", reals(3, 30, 34), slow=True)
class RetinaNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c2 = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True))
        self.c3 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.c4 = nn.Sequential(nn.Conv2d(8, 10, 3, 2, 1), nn.BatchNorm2d(10), nn.ReLU(True))
        self.fpn = FPN((6, 8, 10), 8)
        self.cls_head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.box_head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(s)) for s in (0.7, 1.0, 1.3)])

    def forward(self, x: Tensor) -> dict[str, Any]:
        c2 = self.c2(x)
        c3 = self.c3(c2)
        c4 = self.c4(c3)
        features = list(self.fpn(OrderedDict([("0", c2), ("1", c3), ("2", c4)])).values())
        logits, boxes = [], []
        for scale, f in zip(self.scales, features, strict=True):
            cls = self.cls_head(f)
            n, _, h, w = cls.shape
            cls = cls.view(n, -1, 3, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 3)
            logits.append(cls)
            box = torch.exp((scale * self.box_head(f)).clamp(max=2.0))
            boxes.append(box.permute(0, 2, 3, 1).reshape(n, -1, 4))
        return {"scores": torch.cat(logits, dim=1).sigmoid(), "boxes": torch.cat(boxes, dim=1)}


class ASPPPooling(nn.Sequential):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@found("deeplab v3", reals(3, 33, 33))
class DeepLab(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        modules: list[nn.Module] = [nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())]
        modules += [
            nn.Sequential(nn.Conv2d(8, 6, 3, padding=r, dilation=r, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            for r in (2, 4)
        ]
        modules.append(ASPPPooling(8, 6))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.classifier = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        x = self.backbone(x)
        _res: list[Tensor] = []
        for conv in self.convs:
            _res += [conv(x)]
        x = self.classifier(self.project(torch.cat(_res, dim=1)))
        x = F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)
        result = OrderedDict()
        result["out"] = x
        result["labels"] = x.argmax(1)
        return result


@found("super-resolution", unit(3, 12, 14), least_db=40.0)
class SuperResolution(nn.Module):
    """Cubic interpolation keeps the scale of the image, so what overshoots the brightest pixel saturates."""

    def __init__(self, upscale: int = 2) -> None:
        super().__init__()
        self.upscale = upscale
        self.head = nn.Conv2d(3, 8, 5, padding=2)
        self.prelu = nn.PReLU(8)
        self.body = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate") for _ in range(3)])
        self.tail = nn.Conv2d(8, 3 * upscale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(upscale)

    def forward(self, lr: Tensor) -> Tensor:
        feat = self.prelu(self.head(lr))
        x = feat
        for conv in self.body:
            x = x + 0.2 * F.leaky_relu(conv(x), 0.2, True)
        x += feat
        out = self.shuffle(self.tail(x))
        base = F.interpolate(lr, scale_factor=self.upscale, mode="bicubic", align_corners=False)
        return (out + base).clamp(0.0, 1.0)


@found("autoencoder with reflection and instance norm", unit(3, 16, 20))
class AutoEncoder(nn.Module):
    """The style transfer network: values of 0 to 1 in, the same out."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(
            nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.InstanceNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.dec = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = (x - 0.5) / 0.5
        y = self.dec(self.enc(y))
        y = F.relu_(F.instance_norm(y))
        y = self.out(F.pad(y, (1, 1, 1, 1), mode="reflect"))
        return (torch.tanh(y) + 1) / 2


# -- attention ---------------------------------------------------------------------------------------------------------


@found("vit", reals(3, 16, 16))
class ViT(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, dim) * 0.2)
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, dim), nn.Dropout(0.1))
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(dim, 10)))

    def forward(self, x: Tensor) -> Tensor:
        n, _c, h, _w = x.shape
        torch._assert(h == 16, f"Wrong image height! Expected 16 but got {h}!")
        x = self.conv_proj(x)
        x = x.reshape(n, 16, 16)
        x = x.permute(0, 2, 1)
        batch_class_token = self.class_token.expand(n, -1, -1)
        x = torch.cat([batch_class_token, x], dim=1)
        x = x + self.pos_embedding
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return self.heads(x[:, 0])


class TimmAttention(nn.Module):
    """qkv in one projection, the batch at axis 1 after the permute, then unbind."""

    def __init__(self, dim: int, num_heads: int = 2, unbind: bool = True) -> None:
        super().__init__()
        self.num_heads, self.unbind = num_heads, unbind
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        if self.unbind:
            q, k, v = qkv.unbind(0)
        else:
            q, k, v = qkv[0], qkv[1], qkv[2]
        q = self.q_norm(q) * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = attn @ v
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


@found("deit", reals(3, 16, 16), slow=True)
class DeiT(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.1)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attns = nn.ModuleList([TimmAttention(dim), TimmAttention(dim, unbind=False)])
        self.ls = nn.ParameterList(nn.Parameter(torch.full((dim,), 0.3)) for _ in range(2))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x + self.pos
        for norm, attn, gamma in zip(self.norms, self.attns, self.ls, strict=True):
            x = x + attn(norm(x)) * gamma
        return self.head(x.mean(dim=1))


def window_partition(x: Tensor, window_size: int) -> Tensor:
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, C)


def window_reverse(windows: Tensor, window_size: int, H: int, W: int) -> Tensor:
    B = windows.shape[0] // (H * W // window_size // window_size)
    x = windows.view(B, H // window_size, W // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, dim: int, ws: int, num_heads: int) -> None:
        super().__init__()
        self.ws, self.num_heads, self.scale = ws, num_heads, (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * ws - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid([torch.arange(ws), torch.arange(ws)], indexing="ij"))
        flat = torch.flatten(coords, 1)
        relative = (flat[:, :, None] - flat[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += ws - 1
        relative[:, :, 1] += ws - 1
        relative[:, :, 0] *= 2 * ws - 1
        self.register_buffer("relative_position_index", relative.sum(-1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        bias = bias.permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.softmax(attn)
        x = (attn @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class SwinBlock(nn.Module):
    attn_mask: Tensor | None

    def __init__(self, dim: int, size: int, ws: int, shift: int) -> None:
        super().__init__()
        self.size, self.ws, self.shift = size, ws, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, ws, 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        if shift > 0:
            img_mask = torch.zeros((1, size, size, 1))
            cuts = (slice(0, -ws), slice(-ws, -shift), slice(-shift, None))
            for cnt, (h, w) in enumerate((h, w) for h in cuts for w in cuts):
                img_mask[:, h, w, :] = cnt
            windows = window_partition(img_mask, ws).view(-1, ws * ws)
            mask = windows.unsqueeze(1) - windows.unsqueeze(2)
            mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        else:
            mask = None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        H = W = self.size
        B, L, C = x.shape
        assert L == H * W, "input feature has wrong size"
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.ws).view(-1, self.ws * self.ws, C)
        windows = self.attn(windows, mask=self.attn_mask)
        x = window_reverse(windows.view(-1, self.ws, self.ws, C), self.ws, H, W)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(B, H * W, C)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, _L, C = x.shape
        x = x.view(B, self.size, self.size, C)
        x0 = x[:, 0::2, 0::2, :]
        x1 = x[:, 1::2, 0::2, :]
        x2 = x[:, 0::2, 1::2, :]
        x3 = x[:, 1::2, 1::2, :]
        x = torch.cat([x0, x1, x2, x3], -1).view(B, -1, 4 * C)
        return self.reduction(self.norm(x))


@found("swin", reals(3, 16, 16), slow=True)
class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.Sequential(SwinBlock(8, 8, 4, 0), SwinBlock(8, 8, 4, 2), PatchMerging(8, 8))
        self.norm = nn.LayerNorm(16)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.norm(self.layers(x))
        x = self.avgpool(x.transpose(1, 2))
        return self.head(torch.flatten(x, 1))


@dataclass
class BertConfig:
    vocab_size: int = 50
    hidden_size: int = 16
    num_attention_heads: int = 2
    intermediate_size: int = 32
    hidden_act: str = "gelu"
    max_position_embeddings: int = 12
    layer_norm_eps: float = 1e-12
    num_hidden_layers: int = 2
    extra: dict[str, Any] = field(default_factory=dict)


ACT2FN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": nn.Mish(),
}


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        new_x_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        x = x.view(new_x_shape)
        return x.permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        attention_scores = torch.matmul(query_layer, key_layer.transpose(-1, -2))
        attention_scores = attention_scores / math.sqrt(self.attention_head_size)
        if attention_mask is not None:
            attention_scores = attention_scores + attention_mask
        attention_probs = nn.functional.softmax(attention_scores, dim=-1)
        context_layer = torch.matmul(attention_probs, value_layer)
        context_layer = context_layer.permute(0, 2, 1, 3).contiguous()
        new_context_layer_shape = (*context_layer.size()[:-2], self.all_head_size)
        return context_layer.view(*new_context_layer_shape)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertSelfAttention(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm1(self.dense(self.attention(x, mask)) + x)
        return self.norm2(self.output(self.act(self.intermediate(x))) + x)


@found("bert", ids(50, 10), lengths_mask(10), ids(2, 10), slow=True)
class Bert(nn.Module):
    position_ids: Tensor

    def __init__(self, config: BertConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BertConfig()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings).expand((1, -1)))
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        input_shape = input_ids.size()
        seq_length = input_shape[1]
        if token_type_ids is None:
            token_type_ids = torch.zeros(input_shape, dtype=torch.long, device=input_ids.device)
        position_ids = self.position_ids[:, :seq_length]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x += self.position_embeddings(position_ids)
        x = self.norm(x)
        if attention_mask is None:
            extended = None
        else:
            extended = attention_mask[:, None, None, :]
            extended = extended.to(dtype=torch.float32)
            extended = (1.0 - extended) * -10000.0
        for layer in self.layer:
            x = layer(x, extended)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return {"last_hidden_state": x, "logits": self.classifier(pooled)}


@found("bert without its optional inputs, mean pooled", ids(50, 8))
class MeanBert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = Bert(BertConfig(hidden_act="gelu_new", num_hidden_layers=1))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.bert(input_ids)["last_hidden_state"]
        return F.normalize(hidden.mean(1), p=2, dim=1)


@found("sentence encoder", ids(50, 10), lengths_mask(10))
class SentenceEncoder(nn.Module):
    """Key padding by masked_fill with -inf, mean pooling over what the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.attn = BertSelfAttention(BertConfig())
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        a = self.attn
        q, k, v = (a.transpose_for_scores(f(x)) for f in (a.query, a.key, a.value))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / a.attention_head_size**0.5
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        out = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).flatten(2)
        hidden = self.norm(x + out)
        expanded = mask.unsqueeze(-1).expand(hidden.size()).float()
        pooled = torch.sum(hidden * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
        return F.normalize(pooled, p=2, dim=1)


class CausalSelfAttention(nn.Module):
    bias: Tensor

    def __init__(self, n_embd: int, n_head: int, block: int, flash: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd, self.flash = n_head, n_embd, flash
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


@found("gpt", ids(40, 9), slow=True)
class GPT(nn.Module):
    def __init__(self, n_embd: int = 16, block: int = 12) -> None:
        super().__init__()
        self.block_size = block
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(40, n_embd),
                "wpe": nn.Embedding(block, n_embd),
                "ln": nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(3)),
                "h": nn.ModuleList(CausalSelfAttention(n_embd, 2, block, flash) for flash in (True, False)),
            }
        )
        self.mlp = nn.Sequential(nn.Linear(n_embd, 32), nn.GELU(approximate="tanh"), nn.Linear(32, n_embd))
        self.lm_head = nn.Linear(n_embd, 40, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        device = idx.device
        _b, t = idx.size()
        assert t <= self.block_size, f"Cannot forward sequence of length {t}"
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        x = x + self.transformer.h[0](self.transformer.ln[0](x))
        x = x + self.transformer.h[1](self.transformer.ln[1](x))
        x = x + self.mlp(self.transformer.ln[2](x))
        return self.lm_head(x[:, [-1], :])


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


def rotate_half(x: Tensor) -> Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_half_by_chunk(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x2.neg(), x1), dim=-1)


@found("llama", ids(40, 8))
class Llama(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int = 16, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.hd = heads, kv_heads, dim // heads
        self.embed_tokens = nn.Embedding(40, dim)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.hd, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.hd, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.gate, self.up, self.down = (nn.Linear(dim, 24, bias=False), nn.Linear(dim, 24, bias=False),
                                         nn.Linear(24, dim, bias=False))  # fmt: skip
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(3))
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, self.hd, 2).float() / self.hd)))

    def forward(self, tokens: Tensor) -> Tensor:
        bsz, seqlen = tokens.shape
        h = self.embed_tokens(tokens)
        position_ids = torch.arange(seqlen, device=tokens.device).unsqueeze(0)
        freqs = (self.inv_freq[None, :, None].float() @ position_ids[:, None, :].float()).transpose(1, 2)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos().unsqueeze(1), emb.sin().unsqueeze(1)
        x = self.norms[0](h)
        xq = self.wq(x).view(bsz, seqlen, self.heads, self.hd).transpose(1, 2)
        xk = self.wk(x).view(bsz, seqlen, self.kv_heads, self.hd).transpose(1, 2)
        xv = self.wv(x).view(bsz, seqlen, self.kv_heads, self.hd).transpose(1, 2)
        xq = (xq * cos) + (rotate_half(xq) * sin)
        xk = (xk * cos) + (rotate_half_by_chunk(xk) * sin)
        rep = self.heads // self.kv_heads
        keys = (
            xk[:, :, None, :, :]
            .expand(bsz, self.kv_heads, rep, seqlen, self.hd)
            .reshape(bsz, self.heads, seqlen, self.hd)
        )
        values = xv.repeat_interleave(rep, dim=1)
        mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device)
        mask = torch.triu(mask, diagonal=1)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.hd)
        scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        h = h + self.wo(output)
        x = self.norms[1](h)
        h = h + self.down(F.silu(self.gate(x)) * self.up(x))
        return F.linear(self.norms[2](h), self.embed_tokens.weight)


@found("hugging face masks", reals(7, 16), lengths_mask(7))
class MaskedDecoder(nn.Module):
    """A causal mask and a padding mask in one, of the smallest number that the dtype has."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = BertSelfAttention(BertConfig())
        self.norm = nn.LayerNorm(16)

    def _causal(self, length: int, dtype: torch.dtype) -> Tensor:
        mask = torch.full((length, length), torch.finfo(dtype).min)
        cond = torch.arange(mask.size(-1))
        mask.masked_fill_(cond < (cond + 1).view(mask.size(-1), 1), 0)
        return mask[None, None, :, :]

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        expanded = attention_mask[:, None, None, :].expand(-1, 1, x.shape[1], -1).to(torch.float32)
        inverted = 1.0 - expanded
        padding = inverted.masked_fill(inverted.to(torch.bool), torch.finfo(torch.float32).min)
        x = x + self.attn(self.norm(x), padding)
        return x + self.attn(x, self._causal(x.shape[1], torch.float32))


@found("detr", reals(3, 16, 16), slow=True)
class DETR(nn.Module):
    """The one-page DETR of its paper: learned queries, row and column embeddings, nn.Transformer, sequence first."""

    def __init__(self, hidden_dim: int = 16, nheads: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, 4, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(12, hidden_dim, 1)
        self.transformer = nn.Transformer(hidden_dim, nheads, 1, 1, dim_feedforward=24)
        self.linear_class = nn.Linear(hidden_dim, 4)
        self.linear_bbox = nn.Linear(hidden_dim, 4)
        self.query_pos = nn.Parameter(torch.rand(5, hidden_dim))
        self.row_embed = nn.Parameter(torch.rand(10, hidden_dim // 2))
        self.col_embed = nn.Parameter(torch.rand(10, hidden_dim // 2))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        x = self.backbone(inputs)
        h = self.conv(x)
        H, W = h.shape[-2:]
        pos = torch.cat(
            [
                self.col_embed[:W].unsqueeze(0).repeat(H, 1, 1),
                self.row_embed[:H].unsqueeze(1).repeat(1, W, 1),
            ],
            dim=-1,
        ).flatten(0, 1).unsqueeze(1)  # fmt: skip
        tgt = self.query_pos.unsqueeze(1).repeat(1, inputs.shape[0], 1)
        h = self.transformer(pos + 0.1 * h.flatten(2).permute(2, 0, 1), tgt).transpose(0, 1)
        return {"pred_logits": self.linear_class(h), "pred_boxes": self.linear_bbox(h).sigmoid()}


@found("detr decoder, batch first", reals(12, 16), slow=True)
class QueryDecoder(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(4, dim)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(dim, 2, 24, batch_first=True, norm_first=True, activation="gelu"), 2
        )
        self.head = nn.Linear(dim, 5)

    def forward(self, memory: Tensor) -> Tensor:
        queries = self.query_embed.weight.unsqueeze(0).expand(memory.size(0), -1, -1)
        return self.head(self.decoder(queries, memory))


# -- signals, points, volumes ------------------------------------------------------------------------------------------


class GatedResidual(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.pad = (3 - 1) * dilation
        self.filter = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.res = nn.Conv1d(channels, channels, 1)
        self.skip = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.pad(x, (self.pad, 0))
        z = torch.tanh(self.filter(y)) * torch.sigmoid(self.gate(y))
        return self.res(z) + x, self.skip(z)


@found("wavenet", reals(1, 40))
class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.blocks = nn.ModuleList(GatedResidual(8, 2**i) for i in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        skips = []
        for block in self.blocks:
            x, skip = block(x)
            skips.append(skip)
        return F.log_softmax(self.end(sum(skips)), dim=1)


class Chomp1d(nn.Module):
    def __init__(self, chomp: int) -> None:
        super().__init__()
        self.chomp_size = chomp

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, i: int, o: int, dilation: int) -> None:
        super().__init__()
        pad = 2 * dilation
        self.net = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(i, o, 3, padding=pad, dilation=dilation)),
            Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv1d(o, o, 3, padding=pad, dilation=dilation), Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.downsample = nn.Conv1d(i, o, 1) if i != o else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


@found("tcn with weight norm", reals(4, 24))
class TCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(TemporalBlock(4, 8, 1), TemporalBlock(8, 8, 2))
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.network(x)[:, :, -1])


@found("3-d convolutions", reals(2, 6, 12, 12))
class Net3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(6), nn.ReLU(True))
        self.conv2_1 = nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn = nn.BatchNorm3d(8)
        self.pool = nn.MaxPool3d((2, 2, 2))
        self.avg = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.conv2_1(self.stem(x)))))
        return self.fc(self.avg(x).flatten(1))


class TNet(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.conv = nn.Conv1d(k, 12, 1)
        self.fc1 = nn.Linear(12, 8)
        self.fc2 = nn.Linear(8, k * k)
        self.bn1, self.bn2 = nn.BatchNorm1d(12), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        batchsize = x.size()[0]
        x = F.relu(self.bn1(self.conv(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 12)
        x = self.fc2(F.relu(self.bn2(self.fc1(x))))
        iden = torch.eye(self.k).view(1, self.k * self.k).repeat(batchsize, 1)
        if x.is_cuda:
            iden = iden.cuda()
        x = x + iden
        return x.view(-1, self.k, self.k)


@found("pointnet", reals(3, 20))
class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stn = TNet(3)
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 12, 1), nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n_pts = x.size()[2]
        trans = self.stn(x)
        x = x.transpose(2, 1)
        x = torch.bmm(x, trans)
        x = x.transpose(2, 1)
        pointfeat = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(pointfeat))
        x = torch.max(x, 2)[0]
        glob = x.unsqueeze(2).repeat(1, 1, n_pts)
        per_point = torch.cat([glob, pointfeat], 1).mean(-1)
        return F.log_softmax(self.fc(x), dim=-1) + per_point[:, :5]


@found("spatial transformer", reals(1, 20, 20), wide=("affine_grid",))
class STN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(1, 4, 7), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
            nn.Conv2d(4, 6, 3), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
        )  # fmt: skip
        self.fc_loc = nn.Sequential(nn.Linear(6 * 2 * 2, 12), nn.ReLU(True), nn.Linear(12, 3 * 2))
        self.fc_loc[2].weight.data.mul_(0.1)
        self.fc_loc[2].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))
        self.conv = nn.Conv2d(1, 4, 3)

    def stn(self, x: Tensor) -> Tensor:
        xs = self.localization(x)
        xs = xs.view(-1, 6 * 2 * 2)
        theta = self.fc_loc(xs)
        theta = theta.view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stn(x)
        return F.relu(F.max_pool2d(self.conv(x), 2)).mean((2, 3))


@found("bird's-eye view by warp", reals(3, 16, 16), wide=("mul",))
class BEV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.flow = nn.Conv2d(6, 2, 3, 1, 1)
        self.fuse = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.image(x)
        offsets = torch.tanh(self.flow(f)) * 3.0
        warped = warp(f, offsets.permute(0, 2, 3, 1), padding_mode="border")
        return self.fuse(torch.cat((f, warped), 1))


@found("lstm tagger", ids(30, 7), slow=True)
class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.hidden2tag = nn.Linear(12, 4)

    def forward(self, sentence: Tensor) -> Tensor:
        embeds = self.word_embeddings(sentence)
        lstm_out, (_h, _c) = self.lstm(embeds)
        tag_space = self.hidden2tag(lstm_out)
        return F.log_softmax(tag_space, dim=-1)


@found("gru with attention pooling", reals(9, 6), slow=True)
class GRUAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, batch_first=True, bidirectional=True)
        self.score = nn.Linear(16, 1, bias=False)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(2, x.size(0), 8).to(x.device)
        out, hn = self.gru(x, h0)
        weights = F.softmax(self.score(torch.tanh(out)), dim=1)
        context = (out * weights).sum(1)
        last = torch.cat((hn[-2], hn[-1]), dim=1)
        return self.fc(torch.cat([context, last], dim=1))


# -- several inputs and outputs, idioms --------------------------------------------------------------------------------


@found("siamese", reals(3, 16, 16), reals(3, 16, 16))
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
            nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16),
        )  # fmt: skip

    def forward_once(self, x: Tensor) -> Tensor:
        return F.normalize(self.backbone(x), dim=-1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        za, zb = self.forward_once(a), self.forward_once(b)
        return (za * zb).sum(dim=-1), (za - zb).pow(2).sum(-1).sqrt()


@found("in-place everywhere", reals(4, 10, 10))
class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.alpha = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu_()
        x = self.bn(x)
        y = self.conv2(x)
        y.add_(x).mul_(self.alpha)
        y -= 0.25
        y /= 2
        y *= torch.sigmoid_(self.conv2(y))
        F.relu_(y)
        y.clamp_(max=3)
        return y.sub_(0.1).neg_().square_()


@found("batch norm after the activation", reals(3, 12, 12))
def bn_after_activation() -> nn.Module:
    def block(i: int, o: int, act: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), act, nn.BatchNorm2d(o))

    return nn.Sequential(
        nn.BatchNorm2d(3), block(3, 6, nn.ELU()), block(6, 8, nn.LeakyReLU(0.1, inplace=True)), nn.MaxPool2d(2),
        block(8, 8, nn.ReLU()), nn.Dropout2d(0.1), nn.Flatten(), nn.LazyLinear(10), nn.BatchNorm1d(10),
        nn.Softmax(dim=-1),
    )  # fmt: skip


@found("multi-task", reals(3, 16, 16))
class MultiTask(nn.Module):
    """Activations by name, a branch on ``self.training``, outputs in a nested dict."""

    ACTS = nn.ModuleDict({"hswish": nn.Hardswish(), "softplus": nn.Softplus(), "selu": nn.SELU()})

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.act = {"relu": F.relu, "hswish": F.hardswish}["hswish"]
        self.cls = nn.Linear(8, 5)
        self.aux = nn.Linear(8, 2)
        self.depth = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.act(self.trunk(x))
        pooled = x.mean((2, 3))
        logits = self.cls(pooled)
        out = {"cls": {"logits": logits, "prob": logits.softmax(-1), "label": logits.argmax(dim=1)}}
        if self.training:
            out["aux"] = self.aux(pooled)
        out["depth"] = F.softplus(self.depth(x)).squeeze(1)
        values, indices = logits.topk(2)
        return {**out, "top": (values, indices)}


@found("einsum and stacks", reals(4, 6, 8))
class EinsumNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeds = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(3)])
        self.w = nn.Parameter(torch.randn(8, 5) * 0.3)
        self.mix = nn.Parameter(torch.randn(4, 4) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("nchw,cd->ndhw", x, self.mix)
        branches = torch.stack([mixed * e for e in self.embeds], dim=1)
        weights = branches.mean(dim=(2, 3, 4)).softmax(1)
        combined = torch.einsum("nkchw,nk->nchw", branches, weights)
        att = torch.einsum("bchw,bdhw->bcd", combined, x)
        out = torch.where(att > 0, att, 0.1 * att)
        tokens = combined.flatten(2).transpose(1, 2)
        a, b = tokens.split([3, 1], dim=-1)
        scored = (combined @ self.w).amax(dim=(1, 2))
        return torch.cat([out.flatten(1), (a**2).sum(1), b.abs().mean(1).sqrt(), scored], dim=1)


@found("mixture of experts, dense", reals(6, 8))
class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        top, _ = scores.topk(2, dim=-1)
        kept = scores.masked_fill(scores < top[..., -1:], -1e9)
        weights = F.softmax(kept, dim=-1)
        outs = torch.stack([e(x) for e in self.experts], dim=-2)
        return (weights.unsqueeze(-1) * outs).sum(dim=-2)


@found("cbam and coordinate attention", reals(8, 10, 12))
class CBAM(nn.Module):
    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c, 4), nn.ReLU(), nn.Linear(4, c))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.conv1 = nn.Conv2d(c, 8, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv_h, self.conv_w = nn.Conv2d(8, c, 1), nn.Conv2d(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        avg = F.avg_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3))).view(x.size(0), -1)
        mx = F.max_pool2d(x, (x.size(2), x.size(3))).flatten(1)
        scale = torch.sigmoid(self.mlp(avg) + self.mlp(mx)).unsqueeze(2).unsqueeze(3).expand_as(x)
        x = x * scale
        compress = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        x = x * torch.sigmoid(self.spatial(compress))
        _n, _c, h, w = x.size()
        x_h = x.mean(dim=3, keepdim=True)
        x_w = x.mean(dim=2, keepdim=True).permute(0, 1, 3, 2)
        y = self.bn1(self.conv1(torch.cat([x_h, x_w], dim=2)))
        y = y * (F.relu6(y + 3, inplace=True) / 6)
        x_h, x_w = torch.split(y, [h, w], dim=2)
        a_w = self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid()
        return x * a_w * self.conv_h(x_h).sigmoid()


@found("keypoints by soft argmax", reals(3, 16, 16))
class SoftArgmax(nn.Module):
    def __init__(self, k: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, k, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        heat = self.net(x)
        b, k, h, w = heat.shape
        p = F.softmax(heat.reshape(b, k, -1) * 2.0, dim=2).reshape(b, k, h, w)
        xs = torch.linspace(-1, 1, w).to(p)
        ys = torch.linspace(-1, 1, h).to(p)
        ex = (p.sum(dim=2) * xs).sum(dim=-1)
        ey = torch.sum(p.sum(dim=3) * ys, dim=-1)
        return torch.stack((ex, ey), dim=-1)


@found("dlrm", ids(10, 3), reals(5))
class DLRM(nn.Module):
    """Pairwise dot products of embeddings, the upper triangle by constant indices."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(10, d) for _ in range(3))
        self.bottom = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, d), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(d + 6, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())

    def forward(self, sparse: Tensor, dense: Tensor) -> Tensor:
        x = self.bottom(dense)
        ly = [table(sparse[:, i]) for i, table in enumerate(self.tables)]
        batch_size, d = x.shape
        T = torch.cat([x, *ly], dim=1).view((batch_size, -1, d))
        Z = torch.bmm(T, torch.transpose(T, 1, 2))
        _, ni, nj = Z.shape
        li = torch.tensor([i for i in range(ni) for j in range(i)])
        lj = torch.tensor([j for i in range(nj) for j in range(i)])
        Zflat = Z[:, li, lj]
        R = torch.cat([x, Zflat], dim=1)
        return self.top(R).squeeze(1)


@found("mlp-mixer", reals(3, 16, 16))
class Mixer(nn.Module):
    def __init__(self, d: int = 12, tokens: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, d, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm([tokens, d])
        self.token = nn.Sequential(nn.Linear(tokens, 20), nn.GELU(), nn.Linear(20, tokens))
        self.channel = nn.Sequential(nn.Linear(d, 20), nn.GELU(), nn.Linear(20, d))
        self.head = nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.view(*x.shape[:2], -1).mT
        x = x + self.token(self.norm1(x).mT).mT
        x = x + self.channel(self.norm2(x))
        return self.head(x.mean(-2))


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
    args = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


@found("diffusion unet block", reals(4, 8, 8), ids(100))
class DiffusionBlock(nn.Module):
    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 2 * c))
        self.inp = nn.Conv2d(4, c, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(2, c), nn.GroupNorm(4, c)
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, 4, 3, padding=1)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.out = nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(timestep_embedding(t, 8))
        while len(emb.shape) < len(x.shape):
            emb = emb[..., None]
        h = self.conv1(F.silu(self.norm1(self.inp(x))))
        scale, shift = emb.chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        b, c, *spatial = h.shape
        flat = h.reshape(b, c, -1)
        q, k, v = self.qkv(flat).chunk(3, dim=1)
        s = 1 / math.sqrt(math.sqrt(c))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * s, k * s), dim=-1)
        a = torch.einsum("bts,bcs->bct", weight, v)
        h = (flat + self.out(a)).reshape(b, c, *spatial)
        return self.conv2(F.silu(h))


@found("functional only", reals(5, 7))
class Functional(nn.Module):
    """No modules: parameters and torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(9, 7) * 0.4), nn.Parameter(torch.randn(9))
        self.w2 = nn.Parameter(torch.randn(9, 4) * 0.4)
        self.k = nn.Parameter(torch.randn(5, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.k, padding=1, groups=5)
        h = torch.addmm(self.b1, x.reshape(-1, 7), self.w1.t()).view(-1, 5, 9)
        h = F.gelu(h) + torch.exp(-h.abs()).log1p()
        h = h / (1e-3 + h.std(dim=-1, keepdim=True))
        y = h @ self.w2
        y = y - y.min(dim=1, keepdim=True).values
        return (y / y.amax(1, keepdim=True).clamp(min=0.5)).permute(0, 2, 1)
