"""The flow of the guide as a script: what it writes and prints, and the listing in docs/tuning-guide.md."""

from __future__ import annotations

import csv
import inspect
import re
import textwrap
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the digits come from scikit-learn: pip install -e '.[examples]'")

from examples import guide
from tests.examples.committed import ROOT

LISTING, OUTPUT = re.findall(
    r"^```\w*\n(.*?)^```$", (ROOT / "docs/tuning-guide.md").read_text().split("## As a script")[1], re.M | re.S
)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_listing_is_the_script() -> None:
    assert textwrap.indent(LISTING, "    ", lambda line: line != "\n") in inspect.getsource(guide.main)
    assert len(inspect.getsource(guide).splitlines()) <= 60


def test_the_script_writes_and_prints_what_the_guide_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guide, "train", partial(guide.train, epochs=10))
    guide.main(tmp_path)
    printed = capsys.readouterr().out
    assert re.sub(r"\d\.\d{4}", "#", printed) == re.sub(r"\d\.\d{4}", "#", OUTPUT)
    in_float, calibrated, integer = map(float, re.findall(r"\d\.\d{4}", printed))
    assert in_float > 0.95
    assert min(calibrated, integer) > in_float - 0.01
    for name, mode in (("calibrated", "FvsQ"), ("integer", "QvsQ")):
        assert "<html" in (tmp_path / name / "profiler.html").read_text()
        table = rows(tmp_path / name / f"similarity-{mode}.csv")
        assert {"conv1", "conv2", "conv3", "fc1", "fc2"} <= {row["Module Name"] for row in table}
        assert all(float(row["Similarity (Cosine)"]) > 0.99 for row in table if row["Module Name"] == "fc2")
