"""Two runs side by side: what changed, what came of edits that were tried, in stable order."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from qatlib.analysis.compare import compare
from qatlib.analysis.compare_view import change, markdown, tables
from qatlib.analysis.findings import Finding, Found, Ignored
from qatlib.analysis.revision import Revision
from tests.pipeline.test_config import PARAMS

PLAIN = PARAMS.read_text(encoding="utf-8")
WIDE = PLAIN.replace("  overrides: []  ", "  overrides:\n  - match: conv1\n    activation: int16\n#  ")
LONGER = PLAIN.replace("  epochs: 1  ", "  epochs: 4  ")
INT16 = Finding(
    "QAT036",
    "warning",
    "Rounding this op makes 60% of the error",
    "conv1",
    edit="qconfig:\n  overrides:\n    - match: conv1\n      activation: int16",
    predicted={"metric": 0.012, "output_sqnr_db": 4.1},
)
TRAIN = Finding("QAT030", "info", "The last epoch is the best one", edit="qat:\n  epochs: 4")
SENTENCE = Finding("QAT033", "warning", "Data differ", edit="Prepare the items of the calib split as those of val")


def summary(integer: float) -> dict[str, Any]:
    return {
        "metric": "accuracy",
        "higher_is_better": True,
        "float": {"accuracy": 0.9, "images": 100},
        "integer": {"accuracy": integer, "images": 100},
        "ratio": {"integer": integer / 0.9},
        "latency_us": 10.0,
        "goals": {"passed": 1, "failed": 0},
        "missing": [],
        "stale": [],
    }


def op(name: str, own: float | None, accumulated: float | None, dtype: str = "int8", mode: str = "FvsQ") -> Any:
    """An op by its two SQNR; None is an error of 0."""
    errors = {
        key: {"sqnr_db": value, "identical": value is None}
        for key, value in (("same_input", own), ("accumulated", accumulated))
    }
    return {"mode": mode, "name": name, "module": name, "call": 0, "type": "Conv2d", "dtype": dtype, **errors}


def analysis(*ops: Any, sqnr: float | None = None) -> dict[str, Any]:
    study = None if sqnr is None else {"sensitivity": {"whole": {"sqnr_db": sqnr}}}
    return {"ops": list(ops), "study": study}


def run(name: str, integer: float = 0.8, params: str = PLAIN, *findings: Finding, **more: Any) -> Revision:
    changes = more.pop("summary", {})
    found = Found(findings, more.pop("ignored", ()))
    return Revision(name, {**summary(integer), **changes}, found, params, more.pop("analysis", None))


def test_scores_and_latency_are_subtracted() -> None:
    document = compare(run("a", 0.8), run("b", 0.85, summary={"latency_us": 12.5}))
    rows = {row["stage"]: row for row in document["metrics"]}
    assert list(rows) == ["float", "integer"]
    assert rows["integer"]["change"] == pytest.approx(0.05)
    assert rows["integer"]["ratio"]["change"] == pytest.approx(0.05 / 0.9)
    assert document["latency_us"] == {"base": 10.0, "head": 12.5, "change": 2.5}


def test_a_number_that_one_lacks_has_no_change() -> None:
    less = run("b")
    del less.summary["integer"], less.summary["latency_us"]
    document = compare(run("a"), less)
    assert document["metrics"][1] == {
        "stage": "integer",
        "base": 0.8,
        "head": None,
        "change": None,
        "ratio": {"base": 0.8 / 0.9, "head": 0.8 / 0.9, "change": 0.0},
        "stale": {"base": False, "head": False},
    }
    assert document["latency_us"]["change"] is None
    json.dumps(document, allow_nan=False)


def test_other_metrics_are_not_subtracted() -> None:
    other = run("b", summary={"metric": "map50", "integer": {"map50": 0.6}, "float": {"map50": 0.7}})
    document = compare(run("a"), other)
    assert [row["change"] for row in document["metrics"]] == [None, None]
    assert "accuracy → map50" in markdown(document)


def test_findings_go_come_and_stay_by_code_and_module() -> None:
    there = Finding("QAT036", "info", "Rounding this op makes 41% of the error", "conv1")
    document = compare(run("a", 0.8, PLAIN, INT16, TRAIN), run("b", 0.8, PLAIN, SENTENCE, there))
    named = {how: [(row["code"], row["module"]) for row in rows] for how, rows in document["findings"].items()}
    assert named == {"new": [("QAT033", "")], "gone": [("QAT030", "")], "stayed": [("QAT036", "conv1")]}
    assert document["findings"]["stayed"][0]["title"] == there.title


def test_parameters_by_dotted_key_lists_whole() -> None:
    assert compare(
        run("a"), run("b", 0.8, WIDE.replace("seed: 0                   # 0 ..", "seed: 7                   # 0 .."))
    )["params"] == [
        {"key": "qconfig.overrides", "base": [], "head": [{"match": "conv1", "activation": "int16"}]},
        {"key": "runtime.seed", "base": 0, "head": 7},
    ]


# -- trials ------------------------------------------------------------------------------------------------------------


def test_an_edit_that_was_tried_has_its_prediction_beside_what_came_of_it() -> None:
    base = run("a", 0.8, PLAIN, INT16, TRAIN, SENTENCE, analysis=analysis(sqnr=20.0))
    document = compare(base, run("b", 0.815, WIDE, analysis=analysis(sqnr=23.5)))
    (row,) = document["trials"]["rows"]
    assert (row["code"], row["module"]) == ("QAT036", "conv1")
    assert row["predicted"] == {"metric": 0.012, "output_sqnr_db": 4.1}
    measured = document["trials"]["measured"]
    assert measured == {
        "stage": "integer",
        "metric": pytest.approx(0.015),
        "output_sqnr_db": pytest.approx(3.5),
    }
    assert document["trials"]["beside"] == []
    text = markdown(document)
    assert "accuracy +0.0120, output SQNR +4.1 dB" in text
    assert "Measured (integer): accuracy +0.0150, output SQNR +3.5 dB." in text


def test_several_edits_have_one_measurement_together() -> None:
    both = WIDE.replace("  epochs: 1  ", "  epochs: 4  ").replace(
        "seed: 0                   # 0 ..", "seed: 7                   # 0 .."
    )
    document = compare(run("a", 0.8, PLAIN, INT16, TRAIN), run("b", 0.82, both))
    assert [row["code"] for row in document["trials"]["rows"]] == ["QAT036", "QAT030"]
    assert document["trials"]["rows"][1]["predicted"] == {}
    assert document["trials"]["beside"] == ["runtime.seed"]
    text = markdown(document)
    assert "| QAT030 | – | qat: epochs: 4 | not predicted |" in text
    assert "accuracy +0.0200, of all 2 together. Changed besides: runtime.seed." in text


def test_what_was_there_before_or_is_no_parameter_was_not_tried() -> None:
    assert compare(run("a", 0.8, WIDE, INT16, SENTENCE), run("b", 0.8, WIDE))["trials"]["rows"] == []
    assert compare(run("a", 0.8, PLAIN, INT16), run("b", 0.8, LONGER))["trials"]["rows"] == []


def test_the_edit_of_an_ignored_finding_counts() -> None:
    base = run("a", ignored=(Ignored(TRAIN, "known"),))
    assert [row["code"] for row in compare(base, run("b", 0.8, LONGER))["trials"]["rows"]] == ["QAT030"]


def test_reports_of_other_parameters_measure_nothing() -> None:
    document = compare(run("a", 0.8, PLAIN, TRAIN), run("workspace", 0.8, LONGER), ["qat", "convert"])
    assert document["trials"]["measured"] == {}
    assert "(qat, convert): run dvc repro" in markdown(document)
    assert "Not measured yet: run dvc repro." in markdown(document)


def test_a_stale_score_is_not_what_was_measured() -> None:
    base = run("a", 0.8, PLAIN, TRAIN, summary={"calib": {"accuracy": 0.7}})
    head = run("b", 0.9, LONGER, summary={"calib": {"accuracy": 0.75}, "stale": ["integer"], "missing": ["qat"]})
    measured = compare(base, head)["trials"]["measured"]
    assert (measured["stage"], measured["metric"]) == ("calib", pytest.approx(0.05))


def test_without_a_study_the_output_sqnr_is_that_of_the_last_op() -> None:
    first = analysis(op("conv", 30.0, 30.0), op("fc", 40.0, 25.0), op("fc", 90.0, 80.0, mode="QvsQ"))
    then = analysis(op("conv", 30.0, 30.0), op("fc", 40.0, 28.0), op("fc", 90.0, 79.0, mode="QvsQ"))
    measured = compare(run("a", 0.8, PLAIN, TRAIN, analysis=first), run("b", 0.8, LONGER, analysis=then))["trials"]
    assert measured["measured"]["output_sqnr_db"] == pytest.approx(3.0)
    assert measured["measured"]["conversion_sqnr_db"] == pytest.approx(-1.0)
    mixed = compare(run("a", analysis=first), run("b", analysis=analysis(sqnr=50.0)))
    assert "output_sqnr_db" not in mixed["trials"]["measured"], "of two ways of measuring there is no difference"


# -- ops ---------------------------------------------------------------------------------------------------------------


def test_ops_come_by_the_error_power_that_changed() -> None:
    first = analysis(op("quiet", 60.0, 60.0), op("same", 30.0, 30.0), op("loud", 20.0, 20.0), op("old", 9.0, 9.0))
    then = analysis(
        op("quiet", 40.0, 60.0), op("same", 30.0, 30.0), op("loud", 22.0, 21.0, "int16"), op("new", 9.0, 9.0)
    )
    ops = compare(run("a", analysis=first), run("b", analysis=then))["ops"]
    assert [row["module"] for row in ops["changed"]] == ["loud", "quiet"], "20 dB at 60 are less noise than 2 dB at 20"
    assert ops["changed"][0]["same_input_sqnr_db"]["change"] == pytest.approx(2.0)
    assert ops["changed"][0]["dtype"] == {"base": "int8", "head": "int16"}
    assert (ops["new"], ops["gone"]) == ([{"mode": "FvsQ", "module": "new"}], [{"mode": "FvsQ", "module": "old"}])


def test_an_op_without_error_is_exact() -> None:
    first, then = analysis(op("a", None, 50.0), op("b", None, 40.0)), analysis(op("a", 80.0, 50.0), op("b", None, 41.0))
    text = markdown(compare(run("a", analysis=first), run("b", analysis=then)))
    assert "| exact → 80.0 | 50.0 |" in text
    assert "| exact | 40.0 → 41.0 (+1.0) |" in text


def test_a_run_without_the_document_says_so() -> None:
    document = compare(run("a"), run("b", analysis=analysis()))
    assert document["ops"] is None
    assert "no reports/analysis.json" in markdown(document)


def test_the_same_two_runs_give_the_same_text_at_any_width() -> None:
    first = run("a", 0.8, PLAIN, INT16, analysis=analysis(*(op(f"op{i}", 20.0 + i, 20.0) for i in range(14))))
    then = run("b|c", 0.9, WIDE, TRAIN, analysis=analysis(*(op(f"op{i}", 21.0 + i, 20.0) for i in range(14))))
    document = compare(first, then)
    assert markdown(document) == markdown(compare(first, then))
    assert "b\\|c" in markdown(document)
    assert "4 more changed" in markdown(document)
    for width in (80, 160):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(tables(document))
        shown = console.export_text()
        assert all(word in shown for word in ("QAT036", "op0", "overrides", "Measured"))
        assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize(("value", "shown"), [(0.5, "+0.5000"), (-0.5, "−0.5000"), (1e-9, "0.0000"), (None, "–")])
def test_a_change_has_its_sign(value: float | None, shown: str) -> None:
    assert change(value) == shown
