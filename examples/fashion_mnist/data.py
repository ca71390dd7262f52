"""Entry point of the data: the splits of Fashion-MNIST as datasets of float images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from examples.fashion_mnist.source import Part, read_part
from qatlib.errors import DataError

_SLICES = {"train": slice(0, 55_000), "val": slice(55_000, 59_000), "calib": slice(59_000, 60_000)}
"""Parts of one random order of the 60,000 training images: no image is in two splits."""


def build(split: str, *, root: str | Path | None = None, seed: int = 0, limit: int | None = None) -> TensorDataset:
    """Images ``[N, 1, 28, 28]`` float32 in [-1, 1] (black -1, white 1) and labels ``[N]`` int64 of one split.

    ``train`` (55,000 images), ``val`` (4,000) and ``calib`` (1,000) are cut from the training images in an order that
    ``seed`` gives: use one seed for all, also for training the float model. ``test`` is the 10,000 official test
    images. ``limit`` keeps the first so many of the split. ``root`` is a folder with the idx files; without it they
    are fetched.

    Raises DataError QAT116 if the files are nowhere, QAT117 if they were altered, QAT119 for a wrong argument.
    """
    _check(split, seed, limit)
    part: Part = "t10k" if split == "test" else "train"
    images, labels = read_part(part, root)
    rows = _rows(split, len(images), seed)[:limit]
    pixels = torch.from_numpy(images[rows]).unsqueeze(1).to(torch.float32)
    return TensorDataset(pixels.div_(127.5).sub_(1.0), torch.from_numpy(labels[rows].astype(np.int64)))


def _rows(split: str, count: int, seed: int) -> np.ndarray:
    if split == "test":
        return np.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return np.asarray(order[_SLICES[split]])


def _check(split: str, seed: int, limit: int | None) -> None:
    if split not in (*_SLICES, "test"):
        raise DataError("QAT119", "split", f"is {split!r}", "Use train, calib, val or test")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise DataError("QAT119", "data.kwargs.seed", f"is {seed!r}", "Use an integer from 0 to 2^63 - 1")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError("QAT119", "data.kwargs.limit", f"is {limit!r}", "Use an integer >= 1, or null for all images")
