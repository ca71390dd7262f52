"""Photographs as inputs of the network, and what the float network said of them.

A photograph gives several inputs: square crops, some of them mirrored. The splits share no photograph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from examples.efficientnet_lite0.fetch import DOWNLOADS, FOLDER, require_downloads
from examples.efficientnet_lite0.model import SIZE
from qatlib.errors import DataError
from qatlib.pipeline.checkpoint import load_weights

Split = Literal["train", "calib", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
REFERENCE = FOLDER / "reference.safetensors"
NO_LABEL = -1

_UNLABELLED = {
    "train": ("brick.png", "gravel.png", "ihc.png", "motorcycle_left.png", "page.png", "retina.jpg"),
    "calib": (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "china.jpg",
        "coffee.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "rocket.jpg",
    ),
    "val": ("coins.png", "flower.jpg", "moon.png"),
}


@dataclass(frozen=True)
class View:
    """A square crop whose side is ``zoom`` of the shorter side of the photograph.

    ``x`` and ``y`` place it: 0 is left or top, 1 right or bottom.
    """

    zoom: float = 224 / 256
    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False

    def of(self, photograph: Image.Image) -> np.ndarray:
        """Pixels ``[224, 224, 3]`` uint8, resized with antialiased bicubic interpolation."""
        width, height = photograph.size
        side = min(width, height) * self.zoom
        left, top = (width - side) * self.x, (height - side) * self.y
        box = (left, top, left + side, top + side)
        pixels = np.asarray(photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))
        return pixels[:, ::-1] if self.mirrored else pixels


PUBLISHED_VIEW = View()
"""The crop with which the network was evaluated when it was published."""
_TEST_VIEWS = (PUBLISHED_VIEW, View(mirrored=True), View(zoom=0.75, x=0.25), View(zoom=0.75, x=0.75, mirrored=True))
_VIEWS = (*_TEST_VIEWS, View(zoom=0.6, x=0, y=0), View(zoom=0.6, x=1, y=0), View(zoom=0.6, x=0, y=1), View(zoom=1, x=1))


class Target(TypedDict):
    """Class of the photograph (0 to 999, or -1 where it has none) and the float network's logits ``[1000]``."""

    label: int
    float: Tensor


class Photographs(Dataset[tuple[Tensor, Target]]):
    """Items are (image ``[3, 224, 224]`` float32, :class:`Target`)."""

    def __init__(self, images: Tensor, labels: list[int], logits: Tensor) -> None:
        self.images, self.labels, self.logits = images, labels, logits

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.images[index], {"label": self.labels[index], "float": self.logits[index]}


def build(split: Split) -> Photographs:
    """``train`` (48 inputs of 6 photographs), ``calib`` (64 of 8), ``val`` (24 of 3) or ``test`` (80 of 20, labelled).

    Raises DataError QAT116 if the photographs were not fetched, QAT117 if the float logits are of other inputs, QAT119
    for another split, and CheckpointError QAT120 if the float logits were not computed.
    """
    images, labels = inputs(split)
    logits = load_weights(REFERENCE).get(split)
    if logits is None or len(logits) != len(labels):
        raise DataError(
            "QAT117",
            str(REFERENCE),
            f"has not the float logits of the {len(labels)} inputs of {split}",
            "Run python -m examples.efficientnet_lite0.prepare",
        )
    return Photographs(images, labels, logits)


def inputs(split: Split) -> tuple[Tensor, list[int]]:
    """Images ``[N, 3, 224, 224]`` and labels; the first view of every photograph comes first.

    Raises DataError QAT116 if the photographs were not fetched, QAT119 for a split that is none.
    """
    if split not in SPLITS:
        raise DataError("QAT119", "split", f"is {split!r}", f"Use {', '.join(SPLITS)}")
    require_downloads()
    paths = photographs(split)
    views = _TEST_VIEWS if split == "test" else _VIEWS
    opened = [Image.open(path).convert("RGB") for path in paths]
    pixels = np.stack([view.of(photograph) for view in views for photograph in opened])
    return normalize(torch.from_numpy(pixels)), [label(path) for path in paths] * len(views)


def normalize(pixels: Tensor) -> Tensor:
    """``[N, H, W, 3]`` of 0 to 255 to ``[N, 3, H, W]`` float32 of -127/128 to 1, as the Lite networks were trained."""
    return ((pixels.permute(0, 3, 1, 2).float() - 127) / 128).contiguous()


def photographs(split: Split) -> list[Path]:
    """Files of one split, by name."""
    if split == "test":
        return sorted(DOWNLOADS.glob("imagenet_*.jpg"))
    return [DOWNLOADS / name for name in _UNLABELLED[split]]


def label(path: Path) -> int:
    """ImageNet class, which is the last number in the name ``imagenet_00_243.jpg``; -1 for any other name."""
    return int(path.stem.rpartition("_")[2]) if path.name.startswith("imagenet_") else NO_LABEL
