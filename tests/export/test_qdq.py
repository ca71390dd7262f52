"""The QDQ flavour: what comes out of ONNX Runtime is close to the Program, and how close is measured, not assumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qatlib.emulator import emulate
from qatlib.errors import ProgramError
from qatlib.export import Distance, export_onnx, measure_distance
from qatlib.fake.qconfig import default_calib_8bit_weight_16bit_act_fake_quant_qconfig as INT16
from qatlib.program import Program
from qatlib.qtype import FLOAT, INT32, QType
from tests.case_builder import int32
from tests.export.programs import builder, program_of, run, tensors
from tests.models import everything, images, model

X = images(16, seed=9)


def distances(program: Program, path: Path, optimize: bool = True) -> dict[str, Distance]:
    export_onnx(program, path, "qdq")
    return measure_distance(program, path, X, optimize)


@pytest.fixture(scope="module")
def bundled() -> Program:
    return program_of(everything(), images(8))


@pytest.mark.parametrize("optimize", [True, False])
def test_an_int8_model_is_within_one_code_nearly_everywhere(bundled: Program, tmp_path: Path, optimize: bool) -> None:
    found = distances(bundled, tmp_path / "net.onnx", optimize)
    codes = {name: d for name, d in found.items() if not bundled.values[name].qtype.is_float}
    assert codes.keys() == {name for name, value in bundled.values.items() if value.qtype.dtype == "int8"}
    assert all(d.equal > 0.99 and d.largest_lsb <= 2 for d in codes.values()), codes
    assert "head.dequant" in found


def test_an_int16_model_is_a_few_codes_away(tmp_path: Path) -> None:
    program = program_of(everything(), images(8), qconfig_dict=INT16)
    found = distances(program, tmp_path / "net.onnx")
    assert all(d.largest_lsb <= 32 for name, d in found.items() if program.values[name].qtype.dtype == "int16"), found


def test_outputs_are_those_of_the_document(bundled: Program, tmp_path: Path) -> None:
    export_onnx(bundled, tmp_path / "net.onnx", "qdq")
    want, got = emulate(bundled, X)[0].numpy(), run(tmp_path / "net.onnx", X)[0]
    assert got.dtype == want.dtype
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_weights_and_bias_are_integers_with_a_scale_per_channel(tmp_path: Path, dtype: str) -> None:
    """The scales come from the multipliers, so the real weights are the trained ones up to their quantization."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    net = model(lambda m, x: m.conv(x) if dtype == "int32" else m.conv(x).relu(), conv=conv)
    program = program_of(net, X, qconfig_dict=INT16 if dtype == "int16" else None)
    assert program.values["conv"].qtype.dtype == dtype
    document = export_onnx(program, tmp_path / "net.onnx", "qdq")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in document.graph.initializer}
    codes, scales = arrays["conv.weight"], arrays["conv.weight.scale"]
    assert (codes.dtype, arrays["conv.bias"].dtype, scales.shape) == (np.int8, np.int32, (4,))
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    step = np.abs(weight).reshape(4, -1).max(axis=1) / 127.5
    assert (np.abs(codes * scales.reshape(4, 1, 1, 1) - weight).reshape(4, -1).max(axis=1) < 0.51 * step).all()
    np.testing.assert_allclose(arrays["conv.bias"] * arrays["conv.bias.scale"], bias, rtol=1e-3)


@pytest.mark.parametrize("pool", [
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d(2, divisor_override=3),
    nn.AdaptiveAvgPool2d(4),
    nn.AdaptiveAvgPool2d((3, 5)),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(2, 2, 0, 2),
    nn.ReLU6(),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("preserved", [False, True])
def test_pools_and_clamps_compute_what_torch_does(pool: nn.Module, preserved: bool, tmp_path: Path) -> None:
    """Once from the attributes of the Program op, once from those of a float island."""
    net = model(lambda m, x: m.pool(x).permute(0, 2, 3, 1), pool=pool)
    kept = ("pool",) if preserved else ()
    program = program_of(net, X, preserve=kept)
    assert bool(program.islands()) == preserved
    found = distances(program, tmp_path / "net.onnx")
    assert found["pool"].largest_lsb <= 1
    assert found["pool"].equal > 0.99


def test_a_wrong_scale_is_measured(bundled: Program, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    document = export_onnx(bundled, path, "qdq")
    (scale,) = (tensor for tensor in document.graph.initializer if tensor.name == "hidden.weight.scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.1), scale.name))
    onnx.save(document, path)
    found = measure_distance(bundled, path, X)
    assert found["view"].equal > 0.99
    assert found["hidden"].equal < 0.9
    assert found["hidden"].largest_lsb >= 5


def test_an_accumulator_that_nothing_dequantizes_is_refused(tmp_path: Path) -> None:
    b = builder()
    x = b.feed((3,), QType("int8", 0.5), "uniform")
    weight = torch.ones((2, 3), dtype=torch.int8)
    y = b.emit("linear", [x], (-1, 2), INT32, {"acc_bound": 384}, weight=weight, bias=int32([0, 0]))
    with pytest.raises(ProgramError, match="QAT220 linear0: is an int32 accumulator"):
        export_onnx(b.finish(y).program, tmp_path / "net.onnx", "qdq")
    z = b.emit("dequantize", [y], (-1, 2), FLOAT, scale=torch.tensor([0.25, 0.5]))
    case = b.finish(z)
    export_onnx(case.program, tmp_path / "net.onnx", "qdq")
    found = measure_distance(case.program, tmp_path / "net.onnx", tensors(case))
    assert found == {z: Distance(1.0, 0.0)}


def test_a_divisor_one_below_the_window_is_kept(tmp_path: Path) -> None:
    """255 of 256 elements: less than a code of int8 apart, but not to be lost in a float output."""
    net = model(lambda m, x: m.pool(x), pool=nn.AvgPool2d(16, divisor_override=255))
    program = program_of(net, X, preserve=("pool",))
    document = export_onnx(program, tmp_path / "net.onnx", "qdq")
    factors = [onnx.numpy_helper.to_array(t) for t in document.graph.initializer]
    assert any(np.allclose(f, 256 / 255, rtol=1e-6, atol=0) for f in factors if f.dtype == np.float32)
