"""Every rule: its planted fault is found with code and module, and nothing is found where there is none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from qatlib.analysis.facts import Facts
from qatlib.analysis.rules import all_rules, run_rules
from qatlib.pipeline.config import Config
from tests.analysis.planted import CLEAN, PLANTED

ROOT = Path(__file__).parents[2]
CODES = [each.code for each in all_rules()]


def test_clean_facts_give_no_finding() -> None:
    assert run_rules(CLEAN) == ()
    assert run_rules(Facts()) == ()


@pytest.mark.parametrize(("code", "severity", "module", "fault"), PLANTED)
def test_planted_fault_is_found(code: str, severity: str, module: str, fault: dict[str, Any]) -> None:
    found = [(f.code, f.severity, f.module) for f in run_rules(replace(CLEAN, **fault))]
    assert (code, severity, module) in found
    assert {c for c, _, _ in found} == {code}, "one fault, one kind of finding"


def test_every_rule_has_a_planted_fault_and_a_page() -> None:
    assert sorted({code for code, *_ in PLANTED}) == CODES
    pages = {path.stem for path in (ROOT / "docs/rules").glob("QAT*.md")}
    assert pages == set(CODES)
    for code in CODES:
        text = (ROOT / f"docs/rules/{code}.md").read_text()
        assert text.startswith(f"# {code} ")
        headings = re.findall(r"^## (.*)$", text, re.M)
        assert headings == ["Why it matters", "How to see it", "How to fix it", "When to ignore it"], code


@pytest.mark.parametrize(("code", "severity", "module", "fault"), PLANTED)
def test_edits_are_legal_params_and_commands_runnable(
    code: str, severity: str, module: str, fault: dict[str, Any]
) -> None:
    for finding in run_rules(replace(CLEAN, **fault)):
        assert finding.edit
        assert finding.command.startswith("dvc ")
        first = finding.edit.split("\n")[0]
        if re.fullmatch(r"\w+:", first):
            params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
            for section, values in YAML(typ="safe").load(finding.edit).items():
                params.setdefault(section, {}).update(values)
            Config.model_validate(params)
