"""docs/tuning-guide.md: every line stands there, and what it names exists and is named by what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qatlib.analysis.rules import Rule, all_rules

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "tuning-guide.md").read_text()
LINES = {
    number: line
    for line in GUIDE.splitlines()
    if line.startswith("| G")
    for number in re.findall(r"G\d+", line.split("|")[1])
}
CODE = re.compile(r"QAT\d{3}")


def test_lines_are_g1_to_g42() -> None:
    numbers = [n for line in dict.fromkeys(LINES.values()) for n in re.findall(r"G(\d+)", line.split("|")[1])]
    assert sorted(map(int, numbers)) == list(range(1, 43))


def test_codes_exist() -> None:
    pages = {path.stem for path in (DOCS / "rules").glob("QAT*.md")}
    errors = set(CODE.findall((DOCS / "errors.md").read_text()))
    named = set(CODE.findall(GUIDE))
    assert named <= pages | errors, sorted(named - pages - errors)
    assert set(re.findall(r"\]\(rules/(QAT\d{3})\.md\)", GUIDE)) == named & pages, "a rule is a link to its page"


@pytest.mark.parametrize("each", all_rules(), ids=lambda each: each.code)
def test_a_rule_is_named_by_the_lines_that_it_applies(each: Rule) -> None:
    numbers = re.findall(r"G\d+", each.guide)
    assert numbers
    assert [number for number in numbers if each.code not in LINES[number]] == []


def test_rules_list_has_the_lines_of_each_rule() -> None:
    listed = dict(re.findall(r"^\| \[(QAT\d{3})\].*\| ([^|]*) \|$", (DOCS / "rules/README.md").read_text(), re.M))
    assert listed == {each.code: each.guide for each in all_rules()}


def test_lines_without_a_code_are_explained() -> None:
    explained = GUIDE.split("## What is not seen")[1].split(" have no code.")[0]
    assert {number for number, line in LINES.items() if not CODE.search(line)} == set(re.findall(r"G\d+", explained))
