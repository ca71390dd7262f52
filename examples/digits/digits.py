"""Model and data in one file: the two functions that the pipeline is given by name.

The network is written the plain way: no batch normalization, activations and pools as functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

_SPLITS = {"train": (0, 1149), "val": (1149, 1309), "calib": (1309, 1437), "test": (1437, 1797)}


class DigitsNet(nn.Module):
    """Three convolutions, one of them with a shortcut, and two linear layers."""

    def __init__(self, channels: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.fc1 = nn.Linear(2 * channels * 2 * 2, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 1, 8, 8]`` to scores ``[N, 10]``."""
        x = F.relu(self.conv1(x))
        x = F.relu(torch.add(self.conv2(x), x))
        x = F.max_pool2d(x, 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        x = torch.flatten(x, 1)
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


class Digits(Dataset[tuple[Tensor, int]]):
    """Items are (image ``[1, 8, 8]`` float32 in [-1, 1], digit); 1,797 in all, each in one split."""

    def __init__(self, split: str) -> None:
        first, last = _SPLITS[split]
        bunch = load_digits()
        order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))[first:last]
        # The file counts ink from 0 to 16; symmetric around zero suits symmetric quantization.
        self.images = torch.from_numpy(bunch.images).to(torch.float32)[order].unsqueeze(1) / 8 - 1
        self.digits = torch.from_numpy(bunch.target)[order].tolist()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.digits[index]


def build_model() -> nn.Module:
    """The untrained network; its weights come from ``model.checkpoint``."""
    return DigitsNet()


def build_data(split: str) -> Digits:
    """The images of ``train`` (1,149), ``val`` (160), ``calib`` (128) or ``test`` (360)."""
    return Digits(split)
