"""summary.json, its Markdown and its terminal table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qatlib.analysis.facts import STAGES, Facts
from qatlib.analysis.findings import Finding, Found
from qatlib.analysis.goals import judge
from qatlib.analysis.summary import build_summary, goal_results, read_metrics
from qatlib.analysis.views import summary_markdown, terminal_table
from qatlib.errors import StageError
from qatlib.pipeline.config import Goal
from tests.analysis.planted import CLEAN, scored

FINDING = Finding(
    "QAT008",
    "warning",
    "Large error",
    "conv1",
    {"op_sqnr_db": 12.34567, "count": 3},
    "qconfig:\n  overrides:\n    - match: conv1\n      activation: int16",
    'dvc exp run --temp -S "qconfig.overrides=[{match: conv1, activation: int16}]"',
)


def test_summary_holds_scores_ratios_and_counts() -> None:
    summary = build_summary(CLEAN, [FINDING], latency_us=12.3456789)
    assert summary["calib"] == {"accuracy": 0.9285, "images": 10_000}
    assert summary["ratio"] == {
        "calib": float(f"{0.9285 / 0.93:.6g}"),
        "qat": float(f"{0.9291 / 0.93:.6g}"),
        "integer": float(f"{0.929 / 0.93:.6g}"),
        "compiled": float(f"{0.929 / 0.93:.6g}"),
    }
    assert summary["goals"] == {"passed": 2, "failed": 0}
    assert summary["findings"] == {"errors": 0, "warnings": 1, "info": 0}
    assert summary["latency_us"] == 12.3457
    assert summary["missing"] == summary["stale"] == []
    assert list(summary) == sorted(summary)


def test_same_facts_give_the_same_finite_json() -> None:
    first, second = (json.dumps(build_summary(CLEAN, [FINDING], 1.0), allow_nan=False) for _ in range(2))
    assert first == second


def test_ratio_is_inverted_when_lower_is_better() -> None:
    facts = Facts(metrics={"float": {"loss": 0.2}, "calib": {"loss": 0.25}}, metric="loss", higher_is_better=False)
    assert build_summary(facts, [])["ratio"] == {"calib": 0.8}


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_stage_without_a_finite_score_is_missing_and_the_later_ones_are_stale(value: float | None) -> None:
    metrics = {stage: dict(numbers) for stage, numbers in CLEAN.metrics.items()}
    if value is None:
        del metrics["qat"]
    else:
        metrics["qat"]["accuracy"] = value
    facts = replace(CLEAN, metrics=metrics)
    summary = build_summary(facts, [])
    assert summary["missing"] == ["qat"]
    assert summary["stale"] == ["integer", "compiled"]
    assert summary["goals"] == {"passed": 1, "failed": 1}, "the goal of the stale integer ratio fails"
    assert "qat" not in summary["ratio"]
    json.dumps(summary, allow_nan=False)


def test_a_stage_that_is_not_expected_is_not_missed() -> None:
    metrics = {stage: CLEAN.metrics[stage] for stage in STAGES if stage != "qat"}
    summary = build_summary(replace(CLEAN, metrics=metrics), [], expected=("float", "calib", "integer", "compiled"))
    assert summary["missing"] == summary["stale"] == []


@pytest.mark.parametrize(
    ("value", "low", "high", "met"),
    [
        (0.99, 0.99, None, True),
        (0.98, 0.99, None, False),
        (5.0, None, 5.0, True),
        (5.1, 1.0, 5.0, False),
        (None, 0.1, None, False),
    ],
)
def test_goals_are_inclusive_and_fail_closed(
    value: float | None, low: float | None, high: float | None, met: bool
) -> None:
    document = {"ratio": {"calib": value}} if value is not None else {}
    (result,) = judge([Goal(metric="ratio.calib", min=low, max=high)], document)
    assert (result.value, result.met) == (value, met)


def test_a_goal_of_something_that_is_no_number_fails() -> None:
    document = {"metric": "accuracy", "flag": {"x": True}, "bad": {"x": math.nan}}
    goals = [Goal(metric=key, min=0.0) for key in ("flag.x", "bad.x", "metric.x", "nothing.here")]
    assert [r.met for r in judge(goals, document)] == [False] * 4


def test_no_key_of_the_summary_is_one_that_dvc_takes_for_a_failure() -> None:
    def keys(document: object) -> set[str]:
        nested = document.values() if isinstance(document, dict) else ()
        return set(document if isinstance(document, dict) else ()).union(*map(keys, nested))

    assert not keys(build_summary(CLEAN, [FINDING], 1.0)) & {"error", "data"}


# -- reading metrics ---------------------------------------------------------------------------------------------------


def test_metrics_of_all_stages_are_read(tmp_path: Path) -> None:
    for folder, text in (
        ("calibrate", '{"calib": {"accuracy": 0.9, "images": 10}}'),
        ("convert", '{"integer": {"accuracy": 0.8}}'),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.json").write_text(text)
    assert read_metrics(tmp_path) == {"calib": {"accuracy": 0.9, "images": 10}, "integer": {"accuracy": 0.8}}


@pytest.mark.parametrize("text", ["{", "[]", '{"calib": 3}'])
def test_a_broken_metrics_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibrate").mkdir()
    (tmp_path / "calibrate" / "metrics.json").write_text(text)
    with pytest.raises(StageError, match=r"QAT195 .*calibrate.metrics\.json"):
        read_metrics(tmp_path)


# -- for people --------------------------------------------------------------------------------------------------------


def test_markdown_holds_the_table_the_goals_and_the_cure() -> None:
    facts = replace(CLEAN, **scored(calib=0.9))
    summary = build_summary(facts, [FINDING], 18.5)
    text = summary_markdown(summary, Found((FINDING,)), goal_results(summary, facts))
    assert "| calibrated | 0.9000 | 96.77% | 10000 |" in text
    assert "- **failed**: `ratio.calib >= 0.99`, is 0.967742" in text
    assert "- passed: `ratio.integer >= 0.99`" in text
    assert "**warning QAT008** `conv1`: Large error" in text
    assert "(`docs/rules/QAT008.md`)" in text
    assert "](" not in text, "a relative link would break wherever the folder of reports is not the root"
    assert "Evidence: op_sqnr_db 12.35, count 3" in text
    assert f"```yaml\n{FINDING.edit}\n```" in text
    assert f"```sh\n{FINDING.command}\n```" in text
    assert "18.5 µs" in text


def test_markdown_tells_how_many_findings_it_leaves_out() -> None:
    summary = build_summary(CLEAN, [FINDING] * 7)
    assert "2 more in `reports/profiler.html`." in summary_markdown(summary, Found((FINDING,) * 7), ())


def test_terminal_table_shows_missing_and_stale_stages() -> None:
    metrics = {stage: CLEAN.metrics[stage] for stage in STAGES if stage != "integer"}
    facts = replace(CLEAN, metrics=metrics)
    summary = build_summary(facts, [FINDING], 18.5)
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(terminal_table(summary, Found((FINDING,)), goal_results(summary, facts)))
    text = captured.get()
    assert "missing" in text
    assert "0.9290 (stale)" in text
    assert "FAILED: ratio.integer >= 0.99, is missing" in text
    assert FINDING.command in text.replace("\n", " ").replace("  ", " ")
    assert "report: reports/profiler.html" in text
