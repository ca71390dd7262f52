"""Image classifiers."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.found.registry import found, reals


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
