"""The statistics table against NumPy, in both orders, and raw features of all three forms of a model."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatlib import get_raw_features, profile_featuremap
from qatlib.analysis.parameters import parameters_of
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.statistics import (
    COLUMNS,
    StatisticsRow,
    StatisticsTable,
    statistics_of,
    statistics_table,
    write_statistics,
)
from qatlib.fake.model import set_fake_quantize
from qatlib.fake.state import FakeQuantState
from tests.analysis.analysis_nets import Trio
from tests.models import calibrated, images, model


def row(table: StatisticsTable, module: str, role: str) -> StatisticsRow:
    return next(row for row in table.rows if (row.module, row.role) == (module, role))


def numbers(x: Tensor) -> tuple[float, float, float, float]:
    values = x.detach().double().numpy()
    return values.min(), values.max(), values.mean(), values.var()


def shown(row: StatisticsRow) -> tuple[float | None, ...]:
    return row.min, row.max, row.mean, row.var


@pytest.fixture(scope="module")
def table(trio: Trio) -> StatisticsTable:
    seen = capture_pair(trio.float_model, trio.fake, list(trio.batches), "FvsQ")
    return statistics_table(seen, parameters_of(trio.fake, quantized=False))


def test_rows_are_inputs_output_and_parameters_in_forward_order(table: StatisticsTable) -> None:
    assert [row.index for row in table.rows] == sorted(row.index for row in table.rows)
    roles = {name: [row.role for row in table.rows if row.module == name] for name in ("x.quant", "block", "cat", "fc")}
    assert roles == {
        "x.quant": ["input", "output"],
        "block": ["input-0", "input-1", "output", "weight", "bias"],
        "cat": ["input-0", "input-1", "output"],
        "fc": ["input", "output", "weight", "bias"],
    }


def test_numbers_are_those_of_the_float_model(trio: Trio, table: StatisticsTable) -> None:
    x = torch.cat(trio.batches)
    with torch.no_grad():
        stem = torch.relu(trio.float_model.bn(trio.float_model.stem(x)))
        block = torch.relu(trio.float_model.block(stem) + stem)
        fc = trio.float_model(x)
    expected = {
        ("x.quant", "input"): x,
        ("stem", "output"): stem,
        ("block", "input-1"): stem,
        ("block", "output"): block,
    }
    expected |= {("fc", "output"): fc, ("fc", "weight"): trio.float_model.fc.weight}
    for (name, role), values in expected.items():
        assert shown(row(table, name, role)) == pytest.approx(numbers(values), rel=1e-4, abs=1e-6), (name, role)


def test_formats_are_those_of_the_calibrated_model(trio: Trio, table: StatisticsTable) -> None:
    assert (row(table, "x.quant", "input").scale, row(table, "x.quant", "input").dtype) == (None, "float32")
    assert (
        row(table, "stem", "input").scale == row(table, "x.quant", "output").scale == trio.fake.qtype("x.quant").scale
    )
    assert (row(table, "fc", "output").scale, row(table, "fc", "output").dtype) == (None, "float32")
    weight, bias = row(table, "stem", "weight"), row(table, "stem", "bias")
    scales = trio.fake.op("stem").weight_scales().numpy()
    assert (weight.dtype, bias.dtype) == ("int8", "int32")
    assert weight.scale == f"{scales.min():.6g} to {scales.max():.6g} (8 channels)"
    units = scales * np.float32(trio.fake.qtype("x.quant").scale or 0)
    assert bias.scale == f"{units.min():.6g} to {units.max():.6g} (8 channels)"


def test_by_range_is_descending_with_unmeasured_rows_last(table: StatisticsTable) -> None:
    empty = StatisticsRow(0, "a", "b", "input", None, None, None, None, None, "int8")
    ranges = [row.range for row in StatisticsTable((empty, *table.rows)).by_range().rows]
    assert ranges[-1] is None
    measured = [value for value in ranges if value is not None]
    assert len(measured) == len(table.rows)
    assert measured == sorted(measured, reverse=True)


def test_files_have_the_columns_and_the_inputs_in_both_modes(trio: Trio, tmp_path: Path) -> None:
    captures = [
        capture_pair(trio.float_model, trio.fake, list(trio.batches), "FvsQ"),
        capture_pair(trio.fake, trio.integer, list(trio.batches), "QvsQ"),
    ]
    tables = statistics_of(captures, {"QvsQ": parameters_of(trio.fake, quantized=True)})
    for mode, one in tables.items():
        write_statistics(one, mode, tmp_path)
    first = []
    for mode in ("FvsQ", "QvsQ"):
        plain, ordered = (
            list(csv.reader(io.StringIO((tmp_path / f"statistics-{mode}{end}.csv").read_text())))
            for end in ("", "-by-range")
        )
        assert plain[0] == list(COLUMNS)
        assert sorted(plain) == sorted(ordered)
        assert plain[1][:4] == ["0", "x.quant", "qatlib.fake.stubs.QuantStub", "input"]
        first.append(plain[1])
    assert first[0] == first[1], "what enters the model is seen in FvsQ and told in both"
    assert float(first[0][4]) == pytest.approx(float(torch.cat(trio.batches).min()), rel=1e-5)


# -- raw features ------------------------------------------------------------------------------------------------------


def test_outputs_of_the_float_model_have_the_names_of_the_quantized(trio: Trio) -> None:
    x = trio.batches[0]
    features = {(f.name, f.role): f.data for f in get_raw_features(trio.float_model, x)}
    with torch.no_grad():
        stem = torch.relu(trio.float_model.bn(trio.float_model.stem(x)))
        assert torch.allclose(features["stem", "output"], stem, atol=1e-5)
        assert torch.allclose(features["fc", "output"], trio.float_model(x), atol=1e-5)
    assert {name for name, _ in features} == {node.name for node in trio.fake.graph.nodes} - {"x", "x.quant"}


@pytest.mark.parametrize("state", list(FakeQuantState))
def test_of_a_fake_quant_model_in_any_state_which_it_keeps(trio: Trio, state: FakeQuantState) -> None:
    fake = calibrated(trio.float_model, *trio.batches[:1])
    set_fake_quantize(fake, state)
    before = {name: tensor.clone() for name, tensor in fake.state_dict().items()}
    features = {(f.name, f.role): f for f in get_raw_features(fake, trio.batches[1])}
    assert all(torch.equal(tensor, before[name]) for name, tensor in fake.state_dict().items())
    out = features["stem", "output"]
    if state is FakeQuantState.VALIDATION:
        codes = out.data / out.scales[0]
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert torch.equal(features["fc", "output"].data, fake.eval()(trio.batches[1]))
        assert features["stem", "weight"].dtype == "int8"
    if state is FakeQuantState.CALIBRATION:
        assert (out.dtype, out.scales) == ("float32", ())


def test_of_an_integer_model_real_numbers_with_its_scales(trio: Trio) -> None:
    x = trio.batches[0]
    features = {(f.name, f.role): f for f in get_raw_features(trio.integer, x)}
    assert torch.equal(features["stem", "output"].data, features["block", "input-0"].data)
    fake = {(f.name, f.role): f for f in get_raw_features(trio.fake, x)}
    for key in (("stem", "output"), ("cat", "output"), ("stem", "weight"), ("stem", "bias"), ("fc", "weight")):
        assert features[key].dtype == fake[key].dtype
        step = max(features[key].scales)
        assert float((features[key].data - fake[key].data).abs().max()) <= step * (1 + 1e-5), key
    again = {(f.name, f.role): f.data for f in get_raw_features(trio.integer.program, x)}
    assert all(torch.equal(again[key], one.data) for key, one in features.items())


def test_profile_of_features_equals_numpy(trio: Trio) -> None:
    features = get_raw_features(trio.fake, trio.batches[0])
    table = profile_featuremap(features)
    assert len(table.rows) == len(features)
    for one, seen in zip(features, table.rows, strict=True):
        amax = float(one.data.abs().max())
        assert shown(seen) == pytest.approx(numbers(one.data), rel=1e-5, abs=1e-6 * amax)
    assert table.csv().splitlines()[0] == ",".join(COLUMNS)


def test_calls_of_a_shared_module_and_several_inputs() -> None:
    net = model(lambda s, x: s.c(s.c(x)) + x, c=nn.Conv2d(3, 3, 1))
    x = images(2, 3, 8)
    titles = {f.module for f in get_raw_features(net, (x,))}
    assert {"c (call 1)", "c (call 2)"} <= titles
    assert {f.module for f in get_raw_features(net, {"x": x})} == titles
    assert {"c (call 1)", "c (call 2)"} <= {f.module for f in get_raw_features(calibrated(net, x), [x])}
