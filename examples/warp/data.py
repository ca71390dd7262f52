"""Entry point of the data: Fashion-MNIST under a random rotation, scale and translation for each image."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.fashion_mnist import data

MAX_ANGLE = math.radians(45)
SCALE = (0.7, 1.0)
"""Size of the item after the warp, of its size before."""
MAX_SHIFT = 0.25
"""In half image widths: 3.5 pixels."""
_ORDER = ("train", "val", "calib", "test")


def build(split: str, *, root: str | Path | None = None, seed: int = 0, limit: int | None = None) -> TensorDataset:
    """Warped images ``[N, 1, 28, 28]`` float32 in [0, 1] (black 0, white 1) and labels ``[N]`` int64 of one split.

    Splits, arguments and errors are those of :func:`examples.fashion_mnist.data.build`. An image keeps its warp, which
    ``seed``, the split and the image's place in it give. Black is 0 so that what a sampler with padding "zeros" finds
    outside of the image looks like the background.
    """
    images, labels = data.build(split, root=root, seed=seed, limit=limit).tensors
    generator = torch.Generator().manual_seed((len(_ORDER) * seed + _ORDER.index(split)) % 2**63)
    theta = random_theta(len(images), generator)
    parts = zip(torch.split(images.add(1).div_(2), 1000), torch.split(theta, 1000), strict=True)
    return TensorDataset(torch.cat([warp(part, matrices) for part, matrices in parts]), labels)


def random_theta(count: int, generator: torch.Generator) -> Tensor:
    """Affine matrices ``[count, 2, 3]`` from output to input coordinates (each -1 to 1), as ``F.affine_grid`` has them.

    Uniform: angle in ±45°, size of the item 0.7 to 1.0, its shift ±0.25 in x and y.
    """
    angle, size, x, y = torch.rand(count, 4, generator=generator).unbind(1)
    angle = (2 * angle - 1) * MAX_ANGLE
    size = SCALE[0] + (SCALE[1] - SCALE[0]) * size
    shift = torch.stack([2 * x - 1, 2 * y - 1], 1).unsqueeze(2) * MAX_SHIFT
    cos, sin = angle.cos() / size, angle.sin() / size
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    # The output pixel at `shift` shows the centre of the input.
    return torch.cat([turn, -turn @ shift], 2)


def warp(images: Tensor, theta: Tensor) -> Tensor:
    """``images`` ``[N, C, H, W]`` seen through ``theta`` ``[N, 2, 3]``: bilinear, 0 outside."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
