from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from examples.fashion_mnist import data as plain
from examples.warp import data, model
from qatlib.errors import DataError
from tests.examples import committed, integer

NAME = "warp"


def random_theta(count: int) -> Tensor:
    return data.random_theta(count, torch.Generator().manual_seed(0))


def bilinear_by_hand(image: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """``image`` through ``theta``, pixel by pixel, align_corners=False and 0 outside."""
    height, width = image.shape
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            at = theta @ [(2 * j + 1) / width - 1, (2 * i + 1) / height - 1, 1]
            x, y = ((at[0] + 1) * width - 1) / 2, ((at[1] + 1) * height - 1) / 2
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        out[i, j] += image[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return out


def test_warp_is_bilinear_with_black_outside() -> None:
    torch.manual_seed(0)
    images, theta = torch.rand(3, 1, 9, 9), random_theta(3)
    expected = [bilinear_by_hand(image[0].numpy(), matrix.numpy()) for image, matrix in zip(images, theta, strict=True)]
    np.testing.assert_allclose(data.warp(images, theta)[:, 0].numpy(), expected, atol=1e-5)


def test_theta_is_a_rotation_over_a_size_and_within_its_bounds() -> None:
    theta = random_theta(5000).double()
    turn, offset = theta[:, :, :2], theta[:, :, 2:]
    size = turn.det() ** -0.5
    rotation = turn * size[:, None, None]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(2).double().expand(5000, 2, 2), atol=1e-5, rtol=0)
    angle = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0])
    shift = -torch.linalg.solve(turn, offset)
    for seen, low, high in (
        (angle, -data.MAX_ANGLE, data.MAX_ANGLE),
        (size, *data.SCALE),
        (shift[:, 0, 0], -data.MAX_SHIFT, data.MAX_SHIFT),
        (shift[:, 1, 0], -data.MAX_SHIFT, data.MAX_SHIFT),
    ):
        assert low - 1e-5 <= float(seen.min()) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < float(seen.max()) <= high + 1e-5


@pytest.mark.parametrize("split", ["train", "val", "calib", "test"])
def test_images_keep_their_label_and_their_warp(root: Path, split: str) -> None:
    images, labels = data.build(split, root=root, limit=50).tensors
    assert (images.shape[0], images.dtype) == (50, torch.float32)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert labels.equal(plain.build(split, root=root, limit=50).tensors[1])
    again, fewer = data.build(split, root=root, limit=50), data.build(split, root=root, limit=1)
    assert again.tensors[0].equal(images)
    assert fewer.tensors[0].equal(images[:1])


def test_splits_and_seeds_have_warps_of_their_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    warp = data.warp

    def spy(images: Tensor, theta: Tensor) -> Tensor:
        seen.append(theta)
        return warp(images, theta)

    monkeypatch.setattr(data, "warp", spy)
    for seed in (0, 1):
        for split in ("train", "val", "calib", "test"):
            data.build(split, root=root, seed=seed, limit=3)
    assert all(not a.equal(b) for i, a in enumerate(seen) for b in seen[:i])


def test_wrong_arguments_are_the_messages_of_the_plain_data(root: Path) -> None:
    with pytest.raises(DataError, match="QAT119 split"):
        data.build("dev", root=root)
    with pytest.raises(DataError, match=r"QAT119 data.kwargs.limit"):
        data.build("val", root=root, limit=0)


def test_the_trace_computes_the_same() -> None:
    torch.manual_seed(0)
    net = model.build(width=8).eval()
    torch.nn.init.normal_(net.localise.theta.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    traced = fx.symbolic_trace(net)
    functions = [getattr(node.target, "__name__", "") for node in traced.graph.nodes if node.op == "call_function"]
    assert functions == ["affine_grid", "grid_sample"]
    for batch in (1, 4):
        images = torch.rand(batch, 1, 28, 28)
        assert net(images).shape == (batch, 10)
        assert traced(images).equal(net(images))


def test_the_untrained_localisation_is_the_identity() -> None:
    torch.manual_seed(0)
    net = model.build()
    images = torch.rand(2, 1, 28, 28)
    theta = net.localise(images)  # type: ignore[operator]
    assert theta.equal(torch.eye(2, 3).expand(2, 2, 3))
    torch.testing.assert_close(data.warp(images, theta), images, atol=1e-5, rtol=0)
    net.eval()
    torch.testing.assert_close(net(images), net.head(net.features(images)))  # type: ignore[operator]


def test_the_loss_reaches_the_localisation() -> None:
    torch.manual_seed(0)
    net = model.build(width=8)
    net(torch.rand(8, 1, 28, 28)).square().sum().backward()
    gradient = net.localise.theta.weight.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    assert float(gradient.abs().max()) > 0


# -- integers --------------------------------------------------------------------------------------------------------


def test_the_docs_show_the_scores() -> None:
    assert committed.scores(NAME)["integer"]["accuracy"] >= 0.98 * committed.scores(NAME)["float"]["accuracy"]
    integer.assert_the_docs_show_the_scores(NAME, "accuracy")


@pytest.mark.slow
def test_the_scores_are_the_committed() -> None:
    with integer.made(NAME) as it:
        integer.assert_scores_are_the_committed(it, abs=0.01)


@pytest.mark.slow
def test_every_op_agrees_with_fake_quant(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_ops_agree(it, tmp_path)


@pytest.mark.slow
def test_onnx_runtime_gives_the_integers(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_onnx_runtime_gives_the_integers(it, tmp_path)


@pytest.mark.slow
def test_the_oracle_gives_the_integers() -> None:
    with integer.made(NAME) as it:
        integer.assert_the_oracle_gives_the_integers(it, items=2)
