"""``analyze.ignore``: what it names leaves the ranking, keeps its reason, and is never lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qatlib.analysis.findings import Finding, read_findings
from qatlib.analysis.ignore import set_aside
from qatlib.analysis.outcome import publish
from qatlib.analysis.rules import run_rules
from qatlib.pipeline.config import Ignore
from tests.analysis.planted import CLEAN, comparison, records

FINDINGS = tuple(
    Finding(code, "warning", "title", module)
    for code, module in (
        ("QAT008", "head.a"),
        ("QAT008", "head.a.exp"),
        ("QAT008", "body"),
        ("QAT011", "head.a"),
        ("QAT012", ""),
    )
)


def record(code: str, match: str = "*", reason: str = "known") -> Ignore:
    return Ignore(code=code, match=match, reason=reason)


@pytest.mark.parametrize(
    ("match", "modules"),
    [
        ("head.a", ["head.a", "head.a.exp"]),
        ("head", ["head.a", "head.a.exp"]),
        ("head.*", ["head.a", "head.a.exp"]),
        (r"re:.*\.exp", ["head.a.exp"]),
        ("*", ["head.a", "head.a.exp", "body"]),
        ("hea", []),
    ],
)
def test_a_record_names_modules_of_its_code(match: str, modules: list[str]) -> None:
    found = set_aside(FINDINGS, (record("QAT008", match),))
    assert [one.finding.module for one in found.ignored] == modules
    assert all(one.finding.code == "QAT008" and one.reason == "known" for one in found.ignored)
    assert sorted((*found.findings, *(one.finding for one in found.ignored)), key=FINDINGS.index) == list(FINDINGS)
    assert len(found.notes) == (not modules)


@pytest.mark.parametrize(
    ("match", "count"), [("head.c", 2), ("head", 2), ("head.c#1", 1), ("head.c#0", 1), ("head.c#2", 0)]
)
def test_a_module_means_all_of_its_calls_and_a_number_one(match: str, count: int) -> None:
    calls = [Finding("QAT008", "warning", "coarse", f"head.c (call {k})") for k in (1, 2)]
    assert len(set_aside(calls, (record("QAT008", match),)).ignored) == count


def test_findings_on_the_whole_model_are_named_by_the_default() -> None:
    assert [one.finding.code for one in set_aside(FINDINGS, (record("QAT012"),)).ignored] == ["QAT012"]
    assert not set_aside(FINDINGS, (record("QAT012", "head"),)).ignored


def test_the_first_record_gives_the_reason_and_a_second_that_also_matches_gets_no_note() -> None:
    found = set_aside(FINDINGS, (record("QAT008", "head.a", "first"), record("QAT008", "*", "second")))
    assert [one.reason for one in found.ignored] == ["first", "first", "second"]
    assert found.notes == ()


def test_a_record_that_matches_nothing_is_one_note() -> None:
    found = set_aside(FINDINGS, (record("QAT008", "body"), record("QAT008", "tail")))
    assert found.notes == (
        "analyze.ignore[1] (QAT008, match 'tail') matches no finding: remove it, or correct it",
    )  # fmt: skip


def test_ignored_findings_are_published_apart(tmp_path: Path) -> None:
    facts = replace(CLEAN, floor=0.99, fvsq=records(conv1={"same_input": comparison(0.2)}))
    assert [f.code for f in run_rules(facts)] == ["QAT012", "QAT008"]
    ignore = (record("QAT008", "conv1", "a <mask>"), record("QAT009", reason="old"))
    outcome = publish(replace(facts, ignore=ignore), tmp_path)
    assert [f.code for f in outcome.findings] == ["QAT012"]
    assert outcome.summary["findings"] == {"errors": 1, "warnings": 0, "info": 0}
    document = json.loads((tmp_path / "findings.json").read_text())
    assert [(f["code"], f["module"], f["reason"]) for f in document["ignored"]] == [("QAT008", "conv1", "a <mask>")]
    assert document["ignored"][0]["evidence"], "the numbers are kept"
    assert document["notes"] == list(outcome.notes)
    assert len(outcome.notes) == 1
    again = read_findings(tmp_path / "findings.json")
    assert again == replace(outcome.found, findings=again.findings, ignored=again.ignored)
    assert again.document() == outcome.found.document()
    page = (tmp_path / "profiler.html").read_text()
    head, fold = page.split('id="ignored"')
    assert "QAT008" not in head
    assert "Ignored: 1" in fold
    assert "<code>conv1</code>" in fold
    assert "a &lt;mask&gt;" in fold
    assert "matches no finding" in fold
    text = (tmp_path / "summary.md").read_text()
    assert "QAT008" not in text
    assert "1 ignored" in text


def test_without_records_the_page_has_no_fold(tmp_path: Path) -> None:
    publish(replace(CLEAN, floor=0.99), tmp_path)
    assert 'id="ignored"' not in (tmp_path / "profiler.html").read_text()
    assert "ignored" not in (tmp_path / "summary.md").read_text()
