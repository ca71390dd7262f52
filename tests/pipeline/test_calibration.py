"""The calibrate stage: the comparison of methods, held-out data, and the files it leaves."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from qatlib.errors import StageError
from qatlib.fake.calibrate import calibrate, quantizers
from qatlib.fake.qconfig import METHODS
from qatlib.fake.ranges import Range, read_ranges
from qatlib.pipeline.calibration import (
    Compared,
    compare_methods,
    range_metrics,
    range_notes,
    read_comparison,
    write_comparison,
)
from qatlib.pipeline.config import CalibrateParams, Config
from qatlib.pipeline.project import Project
from stages.calibrate import main
from tests.pipeline import tiny
from tests.pipeline.conftest import Enter

BASE: dict[str, Any] = {
    "model": {"factory": "tests.pipeline.tiny:build_model", "checkpoint": "float.safetensors", "code": "tiny.py"},
    "data": {"factory": "tests.pipeline.tiny:build_data", "code": "tiny.py", "batch_size": 64},
}
ALL = ["min_max", "percentile", {"method": "percentile", "percentile": 90.0}, "mse", "kl", "mix", "auto"]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tiny.train()


@pytest.fixture
def folder(enter: Enter, weights: dict[str, Tensor]) -> Path:
    return enter("", weights)


def project(**section: Any) -> Project:
    settings = {"batches": 2, "batch_size": 32, **section}
    return Project(Config.model_validate({**BASE, "calibrate": settings}))


def stage(folder: Path, **section: Any) -> str:
    """Run the calibrate stage; what it printed."""
    settings = {**BASE, "calibrate": {"batches": 2, "batch_size": 32, **section}}
    (folder / "params.yaml").write_text(json.dumps(settings))
    done = CliRunner().invoke(main, [], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_comparison_is_what_separate_calibrations_score(folder: Path) -> None:
    made = project(method="mse", compare=ALL, compare_images=100)
    model = made.fake_quant_model()
    calibrate(model, made.batches("calib"), histograms=True)
    own = [float(fake.scale) for _, fake in quantizers(model)]
    found = compare_methods(made, model)
    assert [row.method for row in found] == [a if isinstance(a, str) else a["method"] for a in ALL]
    assert [row.percentile for row in found[:4]] == [None, 99.99, 90.0, None]
    assert [float(fake.scale) for _, fake in quantizers(model)] == own, "the method chosen stays"
    float_value = made.evaluate(made.float_model, "val", 100).value
    for asked, row in zip(ALL, found, strict=True):
        alone = project(**({"method": asked} if isinstance(asked, str) else asked))
        fresh = alone.fake_quant_model()
        calibrate(fresh, alone.batches("calib"))
        assert row.value == alone.evaluate(fresh, "val", 100).value
        assert row.ratio == pytest.approx(row.value / float_value)
        assert row.images == 100
    assert found[2].value < found[1].value, "cutting off a tenth of the values costs"


def test_no_comparison_asked_for_evaluates_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = project()
    monkeypatch.setattr(made, "evaluate", lambda *_: pytest.fail("evaluated"))
    assert compare_methods(made, made.fake_quant_model()) == ()
    write_comparison("compare.csv", (), "accuracy")
    assert Path("compare.csv").read_text() == "method,percentile,accuracy,ratio,images,seconds\n"


def test_the_stage_leaves_its_tables_and_numbers(folder: Path) -> None:
    shown = stage(folder, method="auto", compare=["min_max", {"method": "percentile", "percentile": 99.5}])
    assert "Calibration methods" in shown
    assert "auto took" in shown
    table = rows(folder / "reports/calibrate/compare.csv")
    assert [(row["method"], row["percentile"], row["images"]) for row in table] == [
        ("min_max", "", "128"),
        ("percentile", "99.5", "128"),
    ]
    assert all(0.5 < float(row["ratio"]) < 1.5 and float(row["seconds"]) >= 0 for row in table)
    ranges = read_ranges(folder / "reports/calibrate/ranges.csv")
    metrics = json.loads((folder / "reports/calibrate/metrics.json").read_text())["calib"]
    assert {r.method for r in ranges} <= set(METHODS[:5]), "what auto took, not auto"
    assert metrics["held_out_tensors"] == len(ranges) > 3
    assert metrics["held_out_images"] == 32
    assert metrics["calibration_images"] == 64
    images = tiny.build_data("val").tensors[0][:32]
    assert (ranges[0].held_low, ranges[0].held_high) == pytest.approx((float(images.min()), float(images.max())))


def test_the_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "compare.csv"
    rows = (Compared("mse", None, 0.5, 0.75, 128, 0.25), Compared("percentile", 99.99, 0.25, math.nan, 128, 0.5))
    write_comparison(path, rows, "accuracy")
    first, second = read_comparison(path)
    assert first == rows[0]
    assert (second.percentile, second.value, math.isnan(second.ratio)) == (99.99, 0.25, True)
    write_comparison(path, (), "accuracy")
    assert read_comparison(path) == ()
    for text in ("method\nmse,1\n", "method\na,b,c,d,e,f\n"):
        path.write_text(text)
        with pytest.raises(StageError, match=r"^QAT195 .*compare\.csv"):
            read_comparison(path)


def test_the_stage_without_comparison_keeps_the_header_and_its_bytes(folder: Path) -> None:
    stage(folder, method="min_max")
    files = [folder / "reports/calibrate" / name for name in ("compare.csv", "ranges.csv", "metrics.json")]
    first = [file.read_bytes() for file in files]
    assert first[0].count(b"\n") == 1
    assert all(math.isnan(r.sqnr_db) for r in read_ranges(files[1]))
    stage(folder, method="min_max")
    assert [file.read_bytes() for file in files] == first


def test_other_held_out_data_is_counted_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tiny.build_data

    def louder(split: str) -> Any:
        data = build(split)
        return torch.utils.data.TensorDataset(data.tensors[0] * (3 if split == "val" else 1), data.tensors[1])

    monkeypatch.setattr(tiny, "build_data", louder)
    shown = stage(folder)
    metrics = json.loads((folder / "reports/calibrate/metrics.json").read_text())["calib"]
    assert metrics["held_out_tensors_outside"] == metrics["held_out_tensors"]
    assert metrics["held_out_least_covered"] < 0.5
    assert metrics["held_out_median_range"] > 2
    worst = min(read_ranges(folder / "reports/calibrate/ranges.csv"), key=lambda r: r.covered)
    assert f"furthest at {worst.op}: {worst.held_largest:.4g} against {worst.largest:.4g}" in " ".join(shown.split())


def span(name: str, largest: float, held: float) -> Range:
    return Range(name, "int8", "mix", largest, 0.01, -largest, 0.0, 0.0, held)


def test_numbers_of_held_out_ranges() -> None:
    found = range_metrics([span("a", 1.0, 0.5), span("b", 2.0, 2.1), span("c", 1.0, 4.0), span("dead", 0.0, 0.0)], 7)
    assert found == {
        "held_out_images": 7,
        "held_out_tensors": 4,
        "held_out_tensors_outside": 1,
        "held_out_least_covered": 0.25,
        "held_out_median_range": 1.05,
    }
    assert range_metrics([], 0)["held_out_least_covered"] == 1.0
    assert range_notes([span("a", 1.0, 1.0)], "mse") == []
    assert range_notes([span("a", 1.0, 1.0)], "auto") == ["auto took mix for 1"]


def test_the_schema_offers_the_methods_that_are_there() -> None:
    for method in METHODS[:6]:
        assert CalibrateParams(method=method).method == method
    assert CalibrateParams.model_validate({"compare": ALL}).compare[2].percentile == 90.0
