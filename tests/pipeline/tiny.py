"""A second, tiny user of the pipeline: nothing of the bundled example, trained in a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

SIZES = {"train": 512, "calib": 64, "val": 128, "test": 256}


class TinyNet(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.body(x) + x)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def build_model(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return TinyNet(classes)


def build_data(split: str, spoil: str = "") -> TensorDataset:
    """Very noisy bright quadrants; the class is the quadrant. ``spoil`` plants one fault."""
    generator = torch.Generator().manual_seed(list(SIZES).index(split))
    count = 0 if spoil == "empty" else SIZES[split]
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = 0.8 * torch.randn(count, 1, 8, 8, generator=generator)
    for k in range(count):
        row, column = divmod(int(labels[k]), 2)
        images[k, 0, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 0.3
    if spoil == "nan":
        images[3, 0, 0, 0] = float("nan")
    if spoil == "labels" or (spoil == "late train label" and split == "train"):
        labels[-1] = 9
    return TensorDataset(images.clamp(-1, 1), labels)


def train() -> dict[str, Tensor]:
    """Float weights of :class:`TinyNet` after a few epochs."""
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images, labels = build_data("train").tensors
    for _ in range(20):
        for start in range(0, len(images), 64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[start : start + 64]), labels[start : start + 64]).backward()
            optimizer.step()
    return model.eval().state_dict()
