"""Codes, messages and their page agree."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from qatlib import errors

ROOT = Path(__file__).parents[1]
CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.QatError)]


def raised() -> set[str]:
    sources = [p for folder in ("qatlib", "stages", "examples") for p in (ROOT / folder).rglob("*.py")]
    return {code for path in sources for code in re.findall(r'"(QAT\d{3})"', path.read_text())}


def test_every_error_has_a_line_in_the_docs_and_none_is_left_over() -> None:
    documented = re.findall(r"^\| (QAT\d{3}) \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == {code for code in raised() if code >= "QAT100"}


def test_every_finding_has_a_page() -> None:
    pages = {path.stem for path in (ROOT / "docs/rules").glob("QAT*.md")}
    assert pages == {code for code in raised() if code < "QAT100"}


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_reads_as_one_message_and_survives_pickling(kind: type[errors.QatError]) -> None:
    error = kind("QAT999", "here", "seen this", "do that")
    assert str(error) == "QAT999 here: seen this. do that."
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.fix) == (kind, str(error), "do that")


def test_errors_are_what_a_caller_would_catch() -> None:
    assert all(len(kind.__bases__) == 2 for kind in CLASSES if kind is not errors.QatError)
