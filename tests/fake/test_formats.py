"""The qconfig table: what every tensor got."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from qatlib import QuantStub, check_qconfig, get_default_qconfig, prepare_qat_fx, set_preserve_qat_mode
from qatlib.fake.formats import FormatRow, format_rows
from tests.models import calibrated, images, model

INT16 = get_default_qconfig("int16")


def rows(module: nn.Module, **options: Any) -> dict[str, FormatRow]:
    return {row.op: row for row in format_rows(calibrated(module, images(2), **options))}


def small(**options: Any) -> dict[str, FormatRow]:
    parts = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3), "head": nn.Conv2d(8, 2, 1)}
    return rows(model(lambda s, x: s.head(torch.cat([s.a(x), s.b(x)], 1)), **parts), **options)


def test_defaults_say_nothing_but_that_the_output_is_high_precision() -> None:
    found = small()
    assert {name: row.message for name, row in found.items() if row.message} == {"head": "high-precision output"}
    assert [found["head"].output, found["head"].observer, found["head"].scale] == ["int32", "", None]
    assert [found["cat"].inputs, found["cat"].output, found["cat"].observer] == ["int8, int8", "int8", "percentile"]
    assert found["cat"].scale > 0  # type: ignore[operator]
    assert found["a"].weight == "int8"
    assert found["a"].weight_axis == 0


def test_each_departure_is_named() -> None:
    fixed = get_default_qconfig().with_activation(scale=0.125)
    names = {"a": INT16, "head": get_default_qconfig("int8", weight="int16"), "x": fixed}
    found = small(qconfig_dict={"module_name": names})
    assert found["x.quant"].observer == "fixed"
    assert found["x.quant"].message == "fixed scale"
    assert found["a"].message == "turns int8 into int16"
    assert found["cat"].message == "inputs of unequal format"
    assert found["cat"].inputs == "int16, int8"
    assert found["head"].message == "output of the network in int8, high precision is off; int16 weights"
    assert found["head"].weight == "int16"


def test_what_stays_float_is_named() -> None:
    found = small(hybrid=True, hybrid_dict={"module_name": ["a"]})
    assert [found["a"].output, found["a"].observer, found["a"].message] == ["float32", "", "stays float"]


def test_kept_formats_axes_and_preserved_ops(tmp_path: Path) -> None:
    parts = {"up": nn.ConvTranspose2d(3, 4, 2), "head": nn.Linear(4 * 64, 2)}
    fake = calibrated(model(lambda s, x: s.head(nn.functional.max_pool2d(s.up(x), 2).flatten(1)), **parts), images(2))
    set_preserve_qat_mode(fake, ("head",))
    table = check_qconfig(fake, tmp_path / "q.csv").set_index("op")
    assert table.loc["up", "weight_axis"] == 1  # [I, O, kH, kW] as torch has it
    assert table.loc["flatten", "observer"] == "as max_pool2d"
    assert table.loc["flatten", "scale"] == table.loc["up", "scale"]
    assert table.loc["head", "message"] == "keeps its fake-quant form after conversion; high-precision output"
    read = pd.read_csv(tmp_path / "q.csv", index_col="op", keep_default_na=False)
    assert list(read.index) == list(table.index)
    assert float(read.loc["up", "scale"]) == pytest.approx(table.loc["up", "scale"], rel=1e-5)


def test_before_calibration_there_is_no_scale() -> None:
    prepared = prepare_qat_fx(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), example_inputs=[images(2)])
    assert [row.scale for row in format_rows(prepared)] == [None, None]


@pytest.mark.parametrize("high", [True, False])
def test_an_output_behind_a_reshape_is_one(high: bool) -> None:
    head = get_default_qconfig(high_precision=True) if high else get_default_qconfig("int8")
    parts = {"head": nn.Conv2d(3, 2, 1)}
    wanted = "high-precision output" if high else "output of the network in int8"
    module = model(lambda s, x: s.head(x).flatten(1), **parts) if not high else model(lambda s, x: s.head(x), **parts)
    assert rows(module, qconfig_dict={"module_name": {"head": head}})["head"].message == wanted


def test_the_setting_that_each_format_comes_from() -> None:
    parts = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3), "head": nn.Conv2d(8, 2, 1)}
    parts["b"].qconfig = INT16
    module = model(lambda s, x: s.head(torch.cat([s.a(x), s.b(x)], 1).softmax(1)), **parts)
    kinds = {nn.Conv2d: get_default_qconfig(weight="int16")}
    found = rows(module, qconfig_dict={"": get_default_qconfig(), "module_type": kinds, "module_name": {"cat": INT16}})
    assert {name: row.output_rule for name, row in found.items() if "." not in name} == {
        "a": "module_type torch.nn.modules.conv.Conv2d",
        "b": "b.qconfig",
        "cat": "module_name cat",
        "head": "module_type torch.nn.modules.conv.Conv2d",
    }
    assert found["x.quant"].output_rule == "global"
    assert found["softmax.exp"].output_rule == "operator"
    assert [found[name].weight_rule for name in ("a", "cat")] == ["module_type torch.nn.modules.conv.Conv2d", ""]


def test_float_ops_name_their_setting_and_a_stub_its_scale() -> None:
    parts = {"q": QuantStub(scale=0.25), "a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3)}
    found = rows(model(lambda s, x: s.b(s.a(s.q(x))), **parts), hybrid=True, hybrid_dict={"module_name": ["a"]})
    assert [found[name].output_rule for name in ("q", "a")] == ["QuantStub", "hybrid_dict"]
    assert [found["q"].scale, found["q"].observer] == [0.25, "fixed"]


def test_every_call_of_a_shared_module_is_marked() -> None:
    shared = {"c": nn.Conv2d(3, 3, 3, padding=1), "d": nn.Conv2d(3, 3, 1), "n": nn.LayerNorm(16)}
    found = rows(model(lambda s, x: s.n(s.d(s.n(s.c(s.c(x) * 2)))), **shared))
    calls = {name: row.call for name, row in found.items()}
    assert [calls[name] for name in ("c", "c#1", "d", "mul")] == ["1 of 2", "2 of 2", "", ""]
    assert {call for name, call in calls.items() if name.startswith(("n.mean", "n.rsqrt"))} == {"1 of 2"}
    assert {call for name, call in calls.items() if name.startswith(("n#1.mean", "n#1.rsqrt"))} == {"2 of 2"}


@pytest.mark.parametrize(
    ("weight", "activation"), [("int8", "int8"), ("int16", "int8"), ("int8", "int16"), ("int16", "int16")]
)
def test_the_bits_that_weights_use(weight: str, activation: str) -> None:
    """What the largest sum, in codes, has beyond 2^30 is lost; only weights of 16 bits come so far."""
    layer = nn.Linear(4096, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.45, 0.5, 4096))
        layer.bias.zero_()
    x = torch.linspace(0.9, 1.0, 4096).expand(4, -1).contiguous()
    spec = get_default_qconfig(activation, method="min_max", weight=weight)
    fake = calibrated(nn.Sequential(layer).eval(), x, qconfig_dict=spec)
    (row,) = (row for row in format_rows(fake) if row.op == "0")
    bits = {"int8": 8, "int16": 16}
    codes_x = x[0].double().numpy() * 2 ** (bits[activation] - 1)
    codes_w = layer.weight.detach()[0].double().numpy() / 0.5 * 2 ** (bits[weight] - 1)
    lost = max(0.0, np.log2(codes_x @ codes_w) - 30) if weight == "int16" else 0.0
    assert row.weight_bits == pytest.approx(bits[weight] - lost, abs=0.02)
    assert lost == 0.0 or lost > 3
