"""Three small networks and a task that they learn in seconds; ``params.yaml`` of every trial names the two factories.

``fault`` arguments plant what a user might write into the model or its data. What training could have left in the
weights is planted afterwards, by :mod:`bench.diagnosis.faults`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

CLASSES, SIDE = 6, 16
SIZES = {"train": 2048, "calib": 256, "val": 512, "test": 1000}
EPOCHS = {"branches": 4, "mobile": 4, "attention": 10}
NOISE = 0.8
ODD = 17
"""Validation image that the fault "one odd" replaces by plain white."""


class Branches(nn.Module):
    """Convolutions with batch norms, a concatenation and a residual sum."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.left = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.deep, self.deep_norm = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.stem_norm(F.relu(x)) if self.fault == "norm after relu" else F.relu(self.stem_norm(x))
        x = self.mix(torch.cat([self.left(x), self.right(x)], 1))
        y = self.deep(x)
        if self.fault == "two readers":
            y = F.relu(self.deep_norm(y) + x) + 1e-3 * y
        else:
            y = F.relu(self.deep_norm(y) + x)
        y = self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return torch.sigmoid(y) if self.fault == "sigmoid" else y


class _Inverted(nn.Module):
    def __init__(self, width: int, expand: int = 4) -> None:
        super().__init__()
        inner = expand * width
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU())
        self.depth = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU()
        )
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depth(self.expand(x)))


class Mobile(nn.Module):
    """Depthwise separable convolutions in two inverted residuals."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.one, self.two = _Inverted(16), _Inverted(16)
        self.last = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.two(self.one(self.stem(x))))
        y = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return torch.sigmoid(y) if self.fault == "sigmoid" else y


class Attention(nn.Module):
    """Patches, one encoder block with layer norms, softmax and gelu."""

    def __init__(self, fault: str = "", width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.fault, self.heads, self.size = fault, heads, width // heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, self.size).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        y = self.head(x.mean(1))
        return torch.sigmoid(y) if self.fault == "sigmoid" else y


NETS = {"branches": Branches, "mobile": Mobile, "attention": Attention}


def build(net: str, fault: str = "") -> nn.Module:
    torch.manual_seed(1)
    return NETS[net](fault)


def data(split: str, fault: str = "", limit: int | None = None) -> TensorDataset:
    """Noisy gratings ``[N, 3, 16, 16]`` within [-1, 1]; the class is the direction and the colour that carries it."""
    count = SIZES[split]
    generator = torch.Generator().manual_seed(list(SIZES).index(split))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angles = labels * (math.pi / CLASSES)
    phase = torch.rand(count, 1, 1, generator=generator) * 2 * math.pi
    along = columns * torch.cos(angles).view(-1, 1, 1) + rows * torch.sin(angles).view(-1, 1, 1)
    waves = 0.4 * torch.sin(along * (2 * math.pi / 5) + phase)
    colours = 0.5 + 0.5 * torch.rand(count, 3, 1, 1, generator=generator)
    x = waves.unsqueeze(1) * colours + NOISE * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    x = x.clamp(-1, 1)
    x = {
        "bytes": (x + 1) * 127.5,
        "positive": (x + 1) / 2,
        "standardized": x * 3,
        "dim calibration": x * 0.2 if split == "calib" else x,
        "dull calibration": x * 0.92 if split == "calib" else x,
        "blank": x * 0 if split in ("calib", "val") else x,
    }.get(fault, x)
    if fault == "one odd" and split == "val":
        x[ODD] = 1.0
    if limit is not None and split == "train":
        x, labels = x[:limit], labels[:limit]
    return TensorDataset(x, labels)


def train(net: str, fault: str = "", data_fault: str = "", limit: int | None = None) -> nn.Module:
    """The network in eval mode after ``EPOCHS`` of Adam, or as many steps on the first ``limit`` images."""
    model = build(net, fault)
    images, labels = data("train", data_fault, limit).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(7)
    rounds = EPOCHS[net] * SIZES["train"] // len(images)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    for _ in range(rounds):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return model.eval()
