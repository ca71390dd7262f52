"""The change of a search through the stages themselves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.pipeline.conftest import lay_out


@pytest.mark.slow
def test_a_repro_of_the_change_measures_what_the_search_did(tmp_path: Path) -> None:
    """Integers and latency of the best, on a project of another user, with one record of its own."""
    project = lay_out(tmp_path / "project")
    project.set(
        qat={"epochs": 0}, goals=[{"metric": "ratio.integer", "min": 0.5}],
        qconfig={"overrides": [{"match": "re:stem|body", "activation": "int16"}]},
    )  # fmt: skip
    for stage in ("calibrate", "qat", "convert"):
        project.stage(stage)
    before = (project.folder / "params.yaml").read_text()
    done = project.run("python", "-m", "qatlib.cli", "tune", "--images", "128", "--write")
    assert "written; run next: dvc repro" in done.stdout
    assert (project.folder / "params.yaml").read_text() != before
    with (project.folder / "tune" / "front.csv").open() as file:
        (best,) = [row for row in csv.DictReader(file) if row["best"] == "1"]
    for stage in ("calibrate", "qat", "convert", "compile_sim"):
        project.stage(stage)
    latency = json.loads((project.folder / "reports/compile_sim/performance.json").read_text())["latency_us"]
    assert latency == pytest.approx(float(best["latency_us"]), rel=1e-5)
    again = project.run("python", "-m", "qatlib.cli", "tune", "--images", "128")
    assert "params.yaml holds this already" in again.stdout
    with (project.folder / "tune" / "front.csv").open() as file:
        now = next(row for row in csv.DictReader(file) if row["point"] == "now")
    for key in ("latency_us", "sqnr_db", "metric"):
        assert now[key] == best[key], key
