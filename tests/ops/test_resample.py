"""Interpolation, grid_sample, affine_grid and warp: against torch, against plain Python integers, end to end."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qatlib
from qatlib.analysis.agreement import gaps
from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import QConfigError
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.graph.same import evaluate_graph
from qatlib.graph.trace import trace
from qatlib.ops.resize import coefficients
from tests.models import calibrated, model
from tests.onnx_runtime import assert_same_in_onnx

RESIZES: dict[str, dict[str, Any]] = {
    "nearest x2": {"scale_factor": 2},
    "nearest to size": {"size": (9, 5)},
    "nearest by a fraction": {"scale_factor": (1.7, 0.6)},
    "nearest, recomputed": {"scale_factor": 1.7, "recompute_scale_factor": True},
    "nearest-exact": {"size": (9, 11), "mode": "nearest-exact"},
    "bilinear x2": {"scale_factor": 2, "mode": "bilinear"},
    "bilinear, corners": {"size": (11, 13), "mode": "bilinear", "align_corners": True},
    "bilinear down": {"size": (3, 4), "mode": "bilinear"},
    "bilinear by a fraction": {"scale_factor": 1.3, "mode": "bilinear"},
    "bicubic": {"scale_factor": 2, "mode": "bicubic"},
}


@pytest.mark.parametrize("options", RESIZES.values(), ids=RESIZES.keys())
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_resizing_an_image(options: dict[str, Any], dtype: str) -> None:
    torch.manual_seed(0)
    net = model(lambda s, x: F.interpolate(x, **options))
    x = torch.randn(2, 3, 6, 7)
    (got,) = evaluate_graph(trace(net, (x,)), (x,))
    torch.testing.assert_close(got, net(x), rtol=1e-5, atol=1e-5)
    fake = calibrated(net, x, qconfig_dict={"": get_default_qconfig(dtype)})
    program = to_program(fake)
    assert [op.kind for op in program][-1] == "dequantize"
    assert_same_in_onnx(program, x)
    found = gaps(fake, program, x)
    nearest = "nearest" in options.get("mode", "nearest")
    assert all(gap.differing == 0 if nearest else gap.largest <= 1 for gap in found.values())


@pytest.mark.parametrize(
    ("shape", "mode"), [((2, 3, 7), "linear"), ((2, 3, 4, 3, 5), "trilinear"), ((1, 2, 3, 4, 5), "nearest")]
)
def test_one_and_three_axes(shape: tuple[int, ...], mode: str) -> None:
    net = model(lambda s, x: s.up(x), up=nn.Upsample(scale_factor=2, mode=mode))
    x = torch.randn(shape)
    (got,) = evaluate_graph(trace(net, (x,)), (x,))
    torch.testing.assert_close(got, net(x), rtol=1e-5, atol=1e-6)
    fake = calibrated(net, x)
    program = to_program(fake)
    assert all(gap.largest <= 1 for gap in gaps(fake, program, x).values())
    assert_same_in_onnx(program, x)


def test_rows_of_coefficients_sum_to_a_power_of_two() -> None:
    weights = [[1 / 3, 1 / 3, 1 / 3], [-0.07, 0.57, 0.5], [0.0, 1.0, 0.0]]
    codes = coefficients(weights, 11)
    assert codes.sum(1).tolist() == [2048] * 3
    assert codes[2].tolist() == [0, 2048, 0]
    assert codes[0].tolist() == [682, 683, 683]  # 3 * 683 is one too many, which the first of the largest gives back


def sampled(x: np.ndarray, grid: np.ndarray, attrs: dict[str, Any], m: list[int], n: list[int]) -> np.ndarray:
    """The contract in Python integers and fractions."""
    k = attrs["bits"]
    batch, channels, *size = x.shape
    out = np.zeros((batch, channels, *grid.shape[1:3]), dtype=np.int64)
    for b, i, j in np.ndindex(batch, *grid.shape[1:3]):
        at = []
        for axis, length in ((1, size[0]), (0, size[1])):
            p = round(Fraction(int(grid[b, i, j, axis]) * m[axis], 2 ** n[axis]))
            p += (i, j)[1 - axis] * 2**k if attrs["unit"] == "pixels" else (length - 1) * 2 ** (k - 1)
            at.append(min(max(p, 0), (length - 1) * 2**k) if attrs["padding_mode"] == "border" else p)
        for c in range(channels):

            def tap(u: int, v: int) -> int:
                return int(x[b, c, u, v]) if 0 <= u < size[0] and 0 <= v < size[1] else 0  # noqa: B023

            if attrs["mode"] == "nearest":
                out[b, c, i, j] = tap(*(round(Fraction(p, 2**k)) for p in at))
                continue
            (u, f), (v, g) = (divmod(p, 2**k) for p in at)
            one = 2**k
            acc = sum(
                tap(u + du, v + dv) * (f if du else one - f) * (g if dv else one - g) for du in (0, 1) for dv in (0, 1)
            )
            out[b, c, i, j] = round(Fraction(acc, one * one))
    return out


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("unit", ["edges", "corners", "pixels"])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_grid_sample(padding: str, mode: str, unit: str, dtype: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7)
    grid = torch.randn(2, 5, 4, 2) * (3 if unit == "pixels" else 0.8)

    class Net(nn.Module):
        def forward(self, x: Tensor, grid: Tensor) -> Tensor:
            if unit == "pixels":
                return qatlib.warp(x, grid, mode, padding)
            return F.grid_sample(x, grid, mode, padding, align_corners=unit == "corners")

    formats = {
        "": get_default_qconfig(dtype, "min_max"),
        "module_name": {"grid": get_default_qconfig("int16", "min_max")},
    }
    fake = calibrated(Net(), x, grid, qconfig_dict=formats)
    program = to_program(fake)
    (op,) = (op for op in program if op.kind == "grid_sample")
    _, traced = emulate(program, (x, grid), trace=True)
    codes = [traced[name].numpy() for name in op.inputs]
    m, n = (program.constant(op, role).tolist() for role in ("multiplier", "shift"))
    np.testing.assert_array_equal(traced[op.output].numpy(), sampled(*codes, dict(op.attrs), m, n))
    assert_same_in_onnx(program, x, grid)
    if mode == "bilinear":
        with torch.no_grad():
            wanted = Net()(x, grid)
        got = traced[op.output] * program.values[op.output].qtype.scale
        assert float((got - wanted).abs().max()) < (0.05 if dtype == "int8" else 0.01)


def test_a_grid_of_int8_is_refused_at_prepare() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, grid: Tensor) -> Tensor:
            return F.grid_sample(x, grid, align_corners=False)

    with pytest.raises(QConfigError, match=r"QAT148 .*grid is int8"):
        prepare_qat_fx(Net(), example_inputs=(torch.randn(1, 2, 4, 4), torch.zeros(1, 3, 3, 2)))


def test_scale_of_a_grid_in_pixels() -> None:
    assert qatlib.get_grid_quant_scale((28, 28), (28, 28)) == 2.0**-8
    assert qatlib.get_grid_quant_scale((512, 1024), (64, 64)) == 2.0**-4
    assert 32767 * qatlib.get_grid_quant_scale((512, 1023), (64, 64)) >= 1023


def test_a_transformer_of_images() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.find = nn.Linear(64, 6)
            self.head = nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            theta = self.find(x.flatten(1)).view(-1, 2, 3)
            grid = F.affine_grid(theta, [x.size(0), 1, 6, 5], align_corners=False)
            return self.head(F.grid_sample(x, grid, align_corners=False))

    net, x = Net(), torch.rand(8, 1, 8, 8)
    program = to_program(calibrated(net, x, qconfig_dict={"": get_default_qconfig("int16", "min_max")}))
    assert [op.kind for op in program if "affine_grid" in op.name] == ["permute", "constant", "matmul", "reshape"]
    (out,) = emulate(program, x)
    with torch.no_grad():
        wanted = net(x)
    assert float((out - wanted).norm() / wanted.norm()) < 0.01
