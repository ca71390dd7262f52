"""What the integer form of an example is held to, given the artifacts of its pipeline."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import compare
from examples.compare import Made
from qatlib.analysis.agreement import gap_table, write_gap_table
from qatlib.emulator import Emulator
from qatlib.export import check_onnx, export_onnx
from tests.examples import committed
from tests.examples.needed import unavailable
from tests.oracle import run

MOST_SHARE = {"int8": 1e-3, "int16": 2.0**-5, "int32": 1e-3}
"""Share of elements off by one code: section 5 of docs/numerics.md, with multipliers of 20 bits."""
MOST_SHARE_OF_SAMPLERS = 2.5e-2
"""Of interpolation. When an 8x8 map is doubled, one result in ten is a tie, of which float32 rounds a quarter the other
way; positions of a grid are rounded to 2^-10 pixels in integers only."""
SAMPLERS = ("grid_sample", "resize_linear")


@contextlib.contextmanager
def made(name: str) -> Iterator[Made]:
    """The pipeline's results, loaded; without them the test cannot be. Torch is as before afterwards."""
    folder = committed.ROOT / "examples" / name
    needed = ("float.safetensors", "artifacts/qat.safetensors", "artifacts/program")
    missing = [path for path in needed if not (folder / path).exists()]
    if missing:
        unavailable(f"{missing[0]} of examples/{name} is not there: dvc repro examples/{name}/dvc.yaml")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        with contextlib.chdir(folder):
            yield compare.load(folder)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def assert_ops_agree(it: Made, scratch: Path) -> None:
    """Every op within its bounds of the fake-quant model's on the same inputs, and near the committed table."""
    found = gap_table(it.model, it.program, *it.inputs())
    for row in found:
        if row.kind == "table" and row.dtype == "int16":
            assert row.stored_lsb is not None
            assert row.largest_lsb <= row.stored_lsb + 0.5 + 2.0**-8, row
            continue
        assert row.largest_lsb <= 1, row
        allowed = (MOST_SHARE_OF_SAMPLERS if row.kind in SAMPLERS else MOST_SHARE[row.dtype]) * row.elements
        assert row.differing <= allowed + 3 * math.sqrt(allowed), row
    now = list(csv.DictReader(write_gap_table(found, scratch / "lsb.csv").splitlines()))
    then = list(csv.DictReader(committed.text(f"examples/{it.folder.name}/reports/lsb.csv").splitlines()))
    for key in ("name", "kind", "dtype", "ops", "elements"):
        assert [row[key] for row in now] == [row[key] for row in then]
    for row in now:
        assert float(row["share"]) == pytest.approx(int(row["differing"]) / int(row["elements"]), rel=1e-4)
    if committed.is_recorded(it.folder.name, "artifacts/qat.safetensors"):
        for new, old in zip(now, then, strict=True):
            _assert_the_same(new, old)
    else:
        # Calibrated, or trained, on another processor: other scales, so other ties. What stays is how many in all.
        totals = sorted(sum(int(row["differing"]) for row in rows) for rows in (now, then))
        assert totals[1] <= 4 * totals[0]


def _assert_the_same(new: dict[str, str], old: dict[str, str]) -> None:
    """Of the same two models. Only the float side may round otherwise, where its kernels are another processor's."""
    count = int(old["differing"])
    assert int(new["differing"]) == pytest.approx(count, abs=5 * math.sqrt(count) + 5), (new, old)
    assert float(new["largest_lsb"]) == pytest.approx(float(old["largest_lsb"]), abs=0.5 if count else 1), (new, old)
    assert new["stored_lsb"] == old["stored_lsb"], (new, old)


def assert_onnx_runtime_gives_the_integers(it: Made, folder: Path) -> None:
    """0 differing elements in every value of the Program, optimizations on and off, of as many as the docs say."""
    path, inputs = folder / "net.onnx", it.inputs()
    export_onnx(it.program, path)
    counts = check_onnx(it.program, path, inputs)
    computed = set(it.program.values) - set(it.program.inputs)
    assert computed <= set(counts)
    assert {name: count for name, count in counts.items() if count} == {}
    elements = sum(x.numel() for name, x in Emulator(it.program).trace(*inputs).items() if name in computed)
    assert committed.shown(it.folder.name)["ONNX Runtime differing"] == f"{sum(counts.values())} of {elements:,}"


def assert_the_oracle_gives_the_integers(it: Made, items: int) -> None:
    """0 elements of any value differ from the contract in NumPy."""
    inputs = it.inputs(items)
    expected, got = run(it.program, *(x.numpy() for x in inputs)), Emulator(it.program).trace(*inputs)
    assert set(expected) == set(it.program.values)
    differing = {name: int(np.sum(expected[name] != x.numpy())) for name, x in got.items()}
    assert {name: count for name, count in differing.items() if count} == {}


def assert_scores_are_the_committed(it: Made, **tolerance: float) -> None:
    """Scored again, the three forms come to the committed values, and those to the metrics of the stages."""
    name, again, then = it.folder.name, compare.score(it), committed.scores(it.folder.name)
    assert again.keys() == then.keys()
    for form, values in then.items():
        assert again[form] == pytest.approx(values, **tolerance), form
    metric = it.project.metric().name
    for form, stage in {"float": "float_check", "fake_quant": "qat", "integer": "convert"}.items():
        assert committed.metrics(name, stage)[metric] == pytest.approx(then[form][metric], rel=1e-5)
    assert committed.metrics(name, "compile_sim")[metric] == committed.metrics(name, "convert")[metric]


def assert_the_docs_show_the_scores(name: str, metric: str, agreement: str = "agreement") -> None:
    """The row of docs/examples.md has float, fake-quant, integer and the agreement of the last two, rounded."""
    found, shown = committed.scores(name), committed.shown(name)
    cells = [shown["float"], shown["fake-quant"], shown["integer"]]
    assert cells == [f"{found[form][metric]:.4f}" for form in ("float", "fake_quant", "integer")]
    assert shown["agreement"] == f"{100 * found['integer_against_fake_quant'][agreement]:.2f} %"
