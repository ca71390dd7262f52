"""Entry point of the data: scenes of several Fashion-MNIST items of different sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.detector.boxes import SIZE
from examples.fashion_mnist import data
from qatlib.errors import DataError

ITEMS = (2, 5)
"""Least and most items that are put into a scene."""
SIDES = (12, 30)
"""Least and most pixels of an item's longer side."""
_MAX_OVERLAP = 0.2
_TRIES = 50
_INK = 0.1
_ORDER = ("train", "val", "calib", "test")


def build(split: str, *, root: str | Path | None = None, seed: int = 0, limit: int | None = None) -> TensorDataset:
    """Scenes ``[N, 1, 64, 64]`` float32 in [-1, 1] (black -1, white 1) and targets ``[N, 5, 5]`` float32 of one split.

    A target row is ``(class, x1, y1, x2, y2)``, the box in pixels; rows without an item have class -1. A scene is made
    of up to 5 images of the split that no other scene uses: 11,000 for ``train``, 800 for ``val``, 200 for ``calib``,
    2,000 for ``test``; ``limit`` keeps the first so many. The other arguments and errors are those of
    :func:`examples.fashion_mnist.data.build`.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError("QAT119", "data.kwargs.limit", f"is {limit!r}", "Use an integer >= 1, or null for all scenes")
    images, labels = data.build(split, root=root, seed=seed).tensors
    count = len(images) // ITEMS[1]
    scenes, targets = [], []
    for number in range(count if limit is None else min(limit, count)):
        rows = slice(number * ITEMS[1], (number + 1) * ITEMS[1])
        random = np.random.default_rng((seed, _ORDER.index(split), number))
        scene, target = compose(images[rows, 0].add(1).div_(2), labels[rows], random)
        scenes.append(scene)
        targets.append(target)
    return TensorDataset(torch.stack(scenes).unsqueeze_(1).mul_(2).sub_(1), torch.stack(targets))


def compose(images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One scene ``[64, 64]`` of the first 2 to 5 ``images`` ``[5, 28, 28]``, both in [0, 1], and its target ``[5, 5]``.

    Each item is cut out along its bounding box, scaled to a random size, and put where no more than a fifth of it or
    of another item is shared; the brighter pixel shows. One that finds no such place in 50 tries is left out.
    """
    scene = torch.zeros(SIZE, SIZE)
    target = torch.full((ITEMS[1], 5), -1.0)
    placed: list[tuple[int, int, int, int]] = []
    for image, label in zip(images[: random.integers(*ITEMS, endpoint=True)], labels, strict=False):
        item = _scaled(_cut_out(image), int(random.integers(*SIDES, endpoint=True)))
        box = _place(item.shape[1], item.shape[0], placed, random)
        if box is not None:
            x1, y1, x2, y2 = box
            scene[y1:y2, x1:x2] = torch.maximum(scene[y1:y2, x1:x2], item)
            target[len(placed)] = torch.tensor([float(label), x1, y1, x2, y2])
            placed.append(box)
    return scene, target


def _cut_out(image: Tensor) -> Tensor:
    """``image`` within the bounding box of its ink; all of it if it has none."""
    ink = image > _INK
    if not ink.any():
        return image
    (y1, y2), (x1, x2) = (torch.aminmax(ink.any(axis).nonzero()) for axis in (1, 0))
    return image[y1 : y2 + 1, x1 : x2 + 1]


def _scaled(item: Tensor, side: int) -> Tensor:
    """``item`` resized so that its longer side has ``side`` pixels."""
    factor = side / max(item.shape)
    height, width = (max(1, round(length * factor)) for length in item.shape)
    scaled = F.interpolate(item[None, None], (height, width), mode="bilinear", align_corners=False, antialias=True)
    return scaled[0, 0].clamp_(0, 1)


def _place(
    width: int, height: int, placed: list[tuple[int, int, int, int]], random: np.random.Generator
) -> tuple[int, int, int, int] | None:
    for _ in range(_TRIES):
        x, y = int(random.integers(SIZE - width + 1)), int(random.integers(SIZE - height + 1))
        box = (x, y, x + width, y + height)
        if all(_shared(box, other) <= _MAX_OVERLAP for other in placed):
            return box
    return None


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection of two boxes as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller
