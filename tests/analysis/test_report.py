"""The page: self-contained, the same bytes for the same data, and complete."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from qatlib.analysis import model_profiler, publish
from qatlib.analysis.findings import Finding, Found
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.report import ReportData, render
from qatlib.analysis.report.detail import script_json
from qatlib.analysis.report.graph import level
from qatlib.analysis.report.names import finding_anchors, ops_of
from qatlib.analysis.report.plots import depth_plot
from qatlib.analysis.report.waterfall import waterfall
from qatlib.analysis.summary import build_summary, goal_results
from qatlib.compiler import compile_model
from tests.analysis.analysis_nets import Trio
from tests.analysis.planted import CLEAN, record, records, scored
from tests.browser.networks import deep

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Checks nesting, collects tags and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.stack.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script" and not self.data:
            self.data = data

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
    assert all(address.startswith("#") and unquote(address[1:]) in page.ids for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
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
    assert page.tags.count("script") == 2, "one of data, one of code"
    assert not {"b", "i", "img"} & set(page.tags[page.tags.index("main") :]) - {"b"}
    assert {address.partition("-")[0] for address in page.addresses} >= {"#findings", "#graph", "#FvsQ", "#QAT008"}
    assert json.loads(page.data)["findings"][0]["title"] == "<b>bold</b>"


def test_data_of_ops_is_complete_and_cannot_end_its_element(trio: Trio, tmp_path: Path) -> None:
    model_profiler(trio.float_model, trio.fake, list(trio.batches), "FvsQ", tmp_path)
    document = json.loads(Page((tmp_path / "profiler.html").read_text()).data)
    seen = capture_pair(trio.float_model, trio.fake, list(trio.batches), "FvsQ")
    assert list(document["ops"]) == [one.name for one in seen.records]
    for one in seen.records:
        shown = document["ops"][one.name]["seen"]["FvsQ"]["histogram"]
        if one.accumulated is None or one.accumulated.histograms is None:
            assert shown is None
            continue
        for (first, *counts), row in zip(shown["counts"], one.accumulated.histograms, strict=True):
            assert sum(counts) == sum(row)
            codes = np.flatnonzero(np.array(row).reshape(64, 4).sum(1))
            assert (first, first + len(counts) - 1) == (codes[0], codes[-1])
    text = script_json({"<!--</script>": "&\u2028"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"<!--</script>": "&\u2028"}


def test_names_lead_to_all_ops_that_they_mean() -> None:
    step = {"module": "norm", "composite": "norm"}
    seen = records(conv1={"module": "head", "call": 1}, conv2={"name": "head#1", "module": "head", "call": 2},
                   join={"name": "norm.a", **step}, fc={"name": "norm.b", **step})  # fmt: skip
    ops = ops_of([seen])
    assert ops.find("head") == ["conv1", "head#1"]
    assert ops.find("head#1") == ops.find("head (call 2)") == ["head#1"]
    assert ops.find("norm") == ["norm.b"], "the last step, by which a composite is judged"
    assert ops.find("norm.a") == ["norm.a"]
    assert ops.find("") == ops.find("other") == ()
    assert ops.link("head (call 2)") == "#op=head%231"
    assert ops.link("other") == ""


def test_findings_of_one_module_and_code_have_anchors_of_their_own() -> None:
    findings = [Finding("QAT008", "info", "", module) for module in ("a", "b (call 2)", "a", "")]
    assert finding_anchors(findings) == ["QAT008-a", "QAT008-b-(call-2)", "QAT008-a-2", "QAT008"]


@pytest.mark.parametrize("db", [9.9, 10.0, 29.9, 30.0, 119.0, 120.0])
def test_colours_follow_the_error(db: float) -> None:
    seen = replace(record(0, "a", "conv", ()).same_input, ref_sq=10 ** (db / 10), se=1.0)  # type: ignore[type-var]
    expected = {9.9: "l0", 10.0: "l1", 29.9: "l2", 30.0: "l3", 119.0: "l4", 120.0: "equal"}[db]
    assert level(record(0, "a", "conv", (), same_input=seen)) == expected
    assert level(record(0, "a", "conv", (), same_input=None)) == "unknown"


def test_a_page_of_300_ops_stays_below_3_mb() -> None:
    text = render(deep(300))
    assert len(text.encode()) < 3e6
    assert len(json.loads(Page(text).data)["ops"]) == 300


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
        "shared.csv",
        "similarity-FvsQ-by-op-error.csv",
        "similarity-FvsQ.csv",
        "statistics-FvsQ-by-range.csv",
        "statistics-FvsQ.csv",
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
