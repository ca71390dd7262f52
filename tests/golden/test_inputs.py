"""Faults in front of the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.golden import Golden, load_golden, write_golden
from tests.golden.planting import BATCH, Array, channels_last, parted
from tests.models import calibrated, images, model


def as_codes(golden: Golden, x: Array) -> Array:
    scale = np.float32(golden.by_name["x.quant"].scale)
    return np.clip(np.rint(x.astype(np.float32) / scale), -128, 127).astype(np.int8)


def normalized_per_channel(x: Array) -> Array:
    mean, std = np.array([0.1, -0.2, 0.3]), np.array([0.7, 0.8, 0.6])
    return (x * std[:, None, None] + mean[:, None, None]).astype(np.float32)


FRONT: dict[str, tuple[Callable[[Array], Array], str, str]] = {
    "0..255": (lambda x: x * np.float32(255), "pre-processing", "0..255"),
    "0..255 in whole numbers": (lambda x: np.clip(np.rint(x * 50 + 128), 0, 255), "pre-processing", "normalization"),
    "one normalization": (lambda x: x * np.float32(0.5) + np.float32(0.45), "pre-processing", "normalization"),
    "normalization per channel": (normalized_per_channel, "pre-processing", "[0.7, 0.8, 0.6]"),
    "BGR": (lambda x: x[:, ::-1], "channel_order", "RGB for BGR"),
    "BGR and channels last": (lambda x: channels_last(x[:, ::-1]), "channel_order", "RGB for BGR"),
    "BGR and normalization": (lambda x: x[:, ::-1] * np.float32(0.5) + 1, "pre-processing", "order [2, 1, 0]"),
    "mirrored": (lambda x: x[..., ::-1], "geometry", "left to right"),
    "shifted": (lambda x: np.roll(x, (1, -2), (2, 3)), "geometry", "shifted by 1 rows and -2 columns"),
    "cropped": (lambda x: x[:, :, 2:-2, 1:-3], "geometry", "cropped"),
    "padded": (lambda x: np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2))), "geometry", "not cropped, or padded"),
    "another sample": (lambda x: x[[1, 1, 1, 1, 1]], "wrong_input", "samples 1, 1, 1, 1, 1"),
    "another order": (lambda x: x[[2, 0, 1, 4, 3]], "batch_order", "another order"),
    "another image": (lambda x: images(BATCH, seed=99).numpy(), "wrong_input", "no sample is like"),
}


@pytest.mark.parametrize(("spoil", "kind", "said"), FRONT.values(), ids=FRONT.keys())
def test_inputs(golden: Golden, tmp_path: Path, spoil: Callable[[Array], Array], kind: str, said: str) -> None:
    x = np.ascontiguousarray(spoil(golden.tensors["x"])).astype(np.float32)
    comparison = parted(golden, tmp_path, {"x": x}, only=["x", "head"])
    first = comparison.first_numbers
    assert first is not None
    assert (first.tensor, first.cause.kind, first.also) == ("x", kind, ())
    assert said in str(first.cause)
    if x.shape == golden.tensors["x"].shape:
        assert comparison.first == first
        seen = comparison.statistics["x"]
        assert seen["golden"].sha256 != seen["device"].sha256
        assert seen["device"].mean == pytest.approx(float(x.astype(np.float64).mean()))


@pytest.mark.parametrize(
    "which", ["one normalization", "normalization per channel", "BGR", "mirrored", "another order"]
)
def test_inputs_of_which_only_the_codes_were_dumped(golden: Golden, tmp_path: Path, which: str) -> None:
    spoil, kind, _ = FRONT[which]
    codes = as_codes(golden, spoil(golden.tensors["x"]))
    comparison = parted(golden, tmp_path, {"x.quant": codes}, only=["x.quant"])
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind, comparison.first.also) == ("x.quant", kind, ())


def test_a_range_that_overdrives_the_codes(golden: Golden, tmp_path: Path) -> None:
    codes = as_codes(golden, golden.tensors["x"] * 255)
    comparison = parted(golden, tmp_path, {"x.quant": codes}, only=["x.quant"])
    assert comparison.first is not None
    assert comparison.first.cause.kind == "pre-processing"
    assert "larger range" in comparison.first.cause.text


@pytest.mark.parametrize("factor", [0.5, 127 / 127.5])
def test_a_factor_is_the_scale_if_the_float_input_is_right_and_open_if_it_is_unseen(
    golden: Golden, tmp_path: Path, factor: float
) -> None:
    changed = {"x.quant": as_codes(golden, golden.tensors["x"] * np.float32(factor))}
    for only, kinds in ((None, ["scale"]), (["x.quant"], ["pre-processing", "scale"])):
        (tmp_path / kinds[0]).mkdir()
        first = parted(golden, tmp_path / kinds[0], changed, only).first
        assert first is not None
        assert [first.cause.kind, *(cause.kind for cause in first.also)] == kinds


def test_a_resized_image(tmp_path: Path) -> None:
    net = model(lambda s, x: s.c(x).flatten(1), c=nn.Conv2d(3, 4, 3))
    smooth = F.interpolate(images(2, size=4), 16, mode="bicubic")
    write_golden(convert_fx(calibrated(net, smooth)).program, smooth, tmp_path / "golden")
    larger = F.interpolate(smooth, 24, mode="bilinear").numpy()
    comparison = parted(load_golden(tmp_path / "golden"), tmp_path, {"x": larger})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "geometry"
    assert "24×24 for 16×16" in comparison.first.cause.text


IDS: dict[str, tuple[Callable[[Array], Array], str, str]] = {
    "one more": (lambda x: x + 1, "offset", "golden +1"),
    "random": (lambda x: np.random.default_rng(9).integers(50, 100, x.shape), "wrong_input", "equal elements 0.00"),
    "another order": (lambda x: x[::-1], "batch_order", "2, 1, 0"),
    "as they are, wider": (lambda x: x.astype(np.int64), "", ""),
}


@pytest.mark.parametrize(("spoil", "kind", "said"), IDS.values(), ids=IDS.keys())
def test_ids(nets: dict[str, Golden], tmp_path: Path, spoil: Callable[[Array], Array], kind: str, said: str) -> None:
    golden = nets["embedding of ids"]
    (name,) = golden.program.inputs
    first = parted(golden, tmp_path, {name: spoil(golden.tensors[name])}, only=[name]).first
    assert (first is None) == (kind == "")
    if first is not None:
        assert (first.cause.kind, first.also) == (kind, ())
        assert said in str(first.cause)


def test_an_inverted_mask(nets: dict[str, Golden], tmp_path: Path) -> None:
    golden = nets["masks"]
    name = golden.program.inputs[1]
    first = parted(golden, tmp_path, {name: 1 - golden.tensors[name]}).first
    assert first is not None
    assert (first.tensor, first.cause.kind, first.also) == (name, "sign", ())
