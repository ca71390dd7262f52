"""The page: self-contained, the same bytes for the same data, and complete."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from qatlib.analysis import model_profiler, publish
from qatlib.analysis.findings import Finding, Found
from qatlib.analysis.report import ReportData, render
from qatlib.analysis.report.plots import depth_plot
from qatlib.analysis.report.waterfall import waterfall
from qatlib.analysis.summary import build_summary, goal_results
from qatlib.compiler import compile_model
from tests.analysis.analysis_nets import Trio
from tests.analysis.planted import CLEAN, records, scored

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Checks nesting, collects tags and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.stack.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def data() -> ReportData:
    facts = replace(CLEAN, **scored(calib=0.9))
    summary = build_summary(facts, [])
    return ReportData(Found(), (records(),), summary, goal_results(summary, facts))


def test_page_is_well_formed_and_needs_no_network() -> None:
    text = render(data())
    page = Page(text)
    assert page.stack == []
    assert {"svg", "table", "script", "style"} <= set(page.tags)
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_page_is_deterministic() -> None:
    assert render(data()) == render(data())


def test_names_from_the_model_are_escaped() -> None:
    evil = Finding("QAT008", "error", "<b>bold</b>", "<script>x</script>", {"<i>": 1}, "a: <", "dvc <")
    seen = records(conv1={"module": "<img src=x>"}, conv2={"module": '"><svg onload=x>'})
    page = Page(render(ReportData(Found((evil,)), (seen,))))
    assert page.stack == []
    assert page.tags.count("script") == 1
    assert not {"b", "i", "img"} & set(page.tags[page.tags.index("main") :]) - {"b"}
    assert page.addresses == ["#findings", "#FvsQ"]


def test_waterfall_runs_from_stage_to_stage() -> None:
    facts = replace(CLEAN, **scored(calib=0.83))
    steps = {step.title: step for step in waterfall(build_summary(facts, [])).steps}  # type: ignore[union-attr]
    calibrated, trained = steps["calibrated"], steps["QAT"]
    assert calibrated.change == pytest.approx(-0.1)
    assert calibrated.worse
    assert not trained.worse
    assert calibrated.at == calibrated.left
    assert calibrated.left + calibrated.width == pytest.approx(steps["float"].at)
    assert trained.at == pytest.approx(trained.left + trained.width)
    assert all(0 <= step.left <= step.left + step.width <= 100 for step in steps.values())


def test_waterfall_without_any_score_is_left_out() -> None:
    assert (
        waterfall({"metric": "accuracy", "ratio": {}, "missing": ["float"], "stale": [], "higher_is_better": True})
        is None
    )


def test_plot_has_a_point_per_measured_op_and_names_the_worst() -> None:
    seen = records()
    plot = depth_plot(seen)
    assert plot.count("<circle") == 5
    assert len(re.search(r'points="([^"]*)"', plot)[1].split()) == 5  # type: ignore[index]
    assert ">x_quant</text>" in plot
    assert depth_plot(replace(seen, records=())) == ""


def test_names_in_the_plot_touch_neither_the_line_nor_each_other() -> None:
    """A net of 60 ops whose error grows: the worst are where the line and most dots are."""
    first = records().records[0]
    rng = np.random.default_rng(0)
    made = []
    for i in range(60):
        db = 50 - 0.6 * i + float(rng.normal()) * 3
        assert first.accumulated is not None
        own, alone = (replace(first.accumulated, ref_sq=10 ** (x / 10), se=1.0) for x in (db, db + 2))
        name = f"layer{i // 6}.block.conv{i}"
        made.append(replace(first, index=i, name=name, module=name, accumulated=own, same_input=alone))
    plot = str(depth_plot(replace(records(), records=tuple(made))))
    line = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', plot)[1].split()]  # type: ignore[index]
    names = re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)" text-anchor="middle">([^<]+)<', plot)
    assert len(names) == 3
    boxes = [(float(x) - 3 * len(t), float(y) - 10, float(x) + 3 * len(t), float(y) + 2) for x, y, t in names]
    for left, top, right, bottom in boxes:
        assert left > 0
        assert right < 960
        xs = np.linspace(left, right, 200)
        at = np.interp(xs, [p[0] for p in line], [p[1] for p in line])
        assert not bool(((at > top) & (at < bottom)).any())
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_unmeasured_ops_are_listed(trio: Trio, tmp_path: Path) -> None:
    model_profiler(trio.fake, trio.integer, list(trio.batches), "QvsQ", tmp_path)
    assert "the output is int32 and has no per-tensor scale" in (tmp_path / "profiler.html").read_text()


def test_model_profiler_writes_tables_and_page(trio: Trio, tmp_path: Path) -> None:
    findings = model_profiler(trio.float_model, trio.fake, list(trio.batches), "FvsQ", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "profiler.html",
        "similarity-FvsQ-by-op-error.csv",
        "similarity-FvsQ.csv",
    ]
    with (tmp_path / "similarity-FvsQ.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 8
    first = (tmp_path / "profiler.html").read_bytes()
    assert model_profiler(trio.float_model, trio.fake, list(trio.batches), "FvsQ", tmp_path) == findings
    assert (tmp_path / "profiler.html").read_bytes() == first


def test_publish_writes_everything_from_one_set_of_facts(trio: Trio, tmp_path: Path) -> None:
    target = Path(__file__).parents[2] / "qatlib/targets/bayes-like.yaml"
    performance = compile_model(trio.integer.program, target).performance.to_dict()
    outcome = publish(replace(CLEAN, floor=0.99), tmp_path, performance)
    assert [f.code for f in outcome.findings] == ["QAT012"]
    assert json.loads((tmp_path / "summary.json").read_text()) == outcome.summary
    assert json.loads((tmp_path / "findings.json").read_text())["findings"][0]["page"] == "docs/rules/QAT012.md"
    assert outcome.summary["latency_us"] == pytest.approx(performance["latency_us"], rel=1e-5)
    page = (tmp_path / "profiler.html").read_text()
    assert 'id="performance"' in page
    assert page.count("<tr>") >= len(performance["ops"])
    assert "QAT012" in (tmp_path / "summary.md").read_text()


def test_publish_does_without_a_compile_result(tmp_path: Path) -> None:
    outcome = publish(CLEAN, tmp_path, {})
    assert "latency_us" not in outcome.summary
    assert 'id="performance"' not in (tmp_path / "profiler.html").read_text()
