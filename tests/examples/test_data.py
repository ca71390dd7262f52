from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.fashion_mnist import data
from qatlib.errors import DataError
from tests.examples.needed import available

SIZES = {"train": 55_000, "val": 4_000, "calib": 1_000, "test": 10_000}


def numbers(images: Tensor) -> Tensor:
    """The number that the pixels of each stand-in image hold."""
    digits = ((images.flatten(1).double() + 1) * 127.5).round().long()
    return (digits * torch.tensor([256**3, 256**2, 256, 1])).sum(1)


@pytest.mark.parametrize("split", SIZES)
def test_a_split_is_float_images_and_int_labels(root: Path, split: str) -> None:
    images, labels = data.build(split, root=root).tensors
    assert images.shape == (SIZES[split], 1, 2, 2)
    assert images.dtype == torch.float32
    assert labels.shape == (SIZES[split],)
    assert labels.dtype == torch.int64


def test_pixels_are_symmetric_around_zero(root: Path) -> None:
    images, _ = data.build("test", root=root).tensors
    expected = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert set(images.flatten().tolist()) <= set(expected.tolist())
    assert images.min() == -1
    assert images.max() == 1


def test_labels_stay_with_their_images(root: Path) -> None:
    for split in SIZES:
        images, labels = data.build(split, root=root).tensors
        assert labels.equal(numbers(images) % 10)


@pytest.mark.parametrize("seed", [0, 7])
def test_train_val_and_calib_share_no_image_and_are_all_of_them(root: Path, seed: int) -> None:
    seen = [numbers(data.build(split, root=root, seed=seed).tensors[0]) for split in ("train", "val", "calib")]
    assert torch.cat(seen).sort().values.equal(torch.arange(60_000))


def test_the_seed_alone_decides_the_splits(root: Path) -> None:
    first, again, other = (numbers(data.build("val", root=root, seed=seed).tensors[0]) for seed in (3, 3, 4))
    assert first.equal(again)
    assert not first.equal(other)
    tests = [data.build("test", root=root, seed=seed).tensors[0] for seed in (3, 4)]
    assert tests[0].equal(tests[1])


def test_limit_keeps_the_first_of_a_split(root: Path) -> None:
    whole, part = (data.build("calib", root=root, limit=limit).tensors for limit in (None, 16))
    assert part[0].equal(whole[0][:16])
    assert part[1].equal(whole[1][:16])
    assert len(data.build("calib", root=root, limit=5_000)) == 1_000


@pytest.mark.parametrize(
    ("split", "kwargs", "where"),
    [
        ("valid", {}, "split"),
        ("val", {"seed": -1}, "seed"),
        ("val", {"seed": "0"}, "seed"),
        ("val", {"limit": 0}, "limit"),
        ("val", {"limit": True}, "limit"),
        ("val", {"limit": 1.5}, "limit"),
    ],
)
def test_wrong_arguments(root: Path, split: str, kwargs: dict[str, object], where: str) -> None:
    with pytest.raises(DataError, match=f"QAT119 .*{where}"):
        data.build(split, root=root, **kwargs)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_real_images() -> None:
    with available():
        data.build("test")
    counts = torch.zeros(10, dtype=torch.int64)
    for split in ("train", "val", "calib"):
        images, labels = data.build(split).tensors
        assert images.shape == (SIZES[split], 1, 28, 28)
        assert (float(images.min()), float(images.max())) == (-1, 1)
        counts += labels.bincount(minlength=10)
    assert counts.tolist() == [6_000] * 10
    assert data.build("test").tensors[1].bincount().tolist() == [1_000] * 10
