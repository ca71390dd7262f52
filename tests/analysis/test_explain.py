"""`qatlib explain`: the page of every code, from a checkout and from a wheel, and what the last run found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qatlib.analysis.explain import PAGES, page
from qatlib.analysis.findings import Finding, Found, Ignored
from qatlib.cli import main
from qatlib.errors import StageError

ROOT = Path(__file__).parents[2]
RULES = sorted(path.stem for path in (ROOT / "docs/rules").glob("QAT*.md"))
ERRORS = re.findall(r"^\| (QAT\d{3}) \| (.*) \| (.*) \|$", (ROOT / "docs/errors.md").read_text(), re.M)
FOUND = Found(
    (
        Finding(
            "QAT008", "warning", "too coarse", "a.conv", {"op_sqnr_db": 3.302}, "qconfig:\n  overrides: []", "dvc exp"
        ),
        Finding("QAT008", "warning", "too coarse", "b.conv"),
        Finding("QAT031", "info", "no epoch won"),
    ),
    (Ignored(Finding("QAT008", "warning", "too coarse", "c.conv"), "c is a mask"),),
)


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reports(folder: Path) -> Path:
    (folder / "reports").mkdir()
    (folder / "reports/findings.json").write_text(json.dumps(FOUND.document()))
    return folder


@pytest.mark.parametrize("code", RULES)
def test_a_rule_is_explained_by_its_page(code: str) -> None:
    assert page(code) == (ROOT / f"docs/rules/{code}.md").read_text()


def test_an_error_is_explained_from_the_table() -> None:
    assert len(ERRORS) > 90
    for code, what, cure in ERRORS:
        text = page(code)
        assert text.startswith(f"# {code}\n")
        assert what in text
        assert cure in text
    assert "Configuration and entry points (`ConfigError`, ValueError)" in page("QAT101")


@pytest.mark.parametrize("written", ["QAT031", "qat031", "31", "031"])
def test_the_page_is_shown_without_reports(folder: Path, written: str) -> None:
    shown = explain(written)
    assert shown.exit_code == 0
    for heading in ("no epoch of QAT beat", "Why it matters", "How to see it", "How to fix it", "When to ignore it"):
        assert heading in shown.output
    assert "## " not in shown.output, "rendered"


def test_what_was_found_stands_above_the_page(reports: Path) -> None:
    shown = explain("QAT008").output
    order = [
        "a.conv",
        "op_sqnr_db 3.302",
        "overrides: []",
        "try: dvc exp",
        "b.conv",
        "c.conv",
        "ignored: c is a mask",
        "Why it matters",
    ]
    places = [shown.index(text) for text in order]
    assert places == sorted(places)
    assert "no epoch won" not in shown
    document = json.loads(explain("8", "--json").output)
    assert [found["module"] for found in document["findings"]] == ["a.conv", "b.conv"]
    assert [found["reason"] for found in document["ignored"]] == ["c is a mask"]
    assert (document["code"], document["page"]) == ("QAT008", page("QAT008"))


@pytest.mark.parametrize(
    ("code", "near"),
    [
        ("QAT042", "QAT037, QAT038, QAT039"),
        ("QATO31", "QAT031"),
        ("??", "QAT001"),
    ],
)
def test_an_unknown_code_is_one_message_with_the_nearest(folder: Path, code: str, near: str) -> None:
    shown = explain(code)
    assert (shown.exit_code, shown.output.count("\n")) == (1, 1)
    assert shown.stderr.startswith(f"QAT227 {code}: ")
    assert near in shown.stderr


def test_findings_that_cannot_be_read_are_one_message(reports: Path) -> None:
    for text in ("{", "[]", '{"findings": [{"nothing": 1}], "ignored": [], "notes": []}', '{"a": 1}'):
        (reports / "reports/findings.json").write_text(text)
        shown = explain("QAT008")
        assert (shown.exit_code, shown.stderr[:6]) == (1, "QAT195"), text


def test_a_wheel_holds_pages_and_scaffold_and_without_pages_one_message_says_so(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for name in ("qatlib", "docs", "stages"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    pages = tmp_path / "installed/qatlib/pages"
    assert not any(path.is_symlink() for path in pages.rglob("*"))
    for name, source_name in (("params.yaml", "params.yaml"), ("pipeline.yaml", "dvc.yaml")):
        assert (tmp_path / "installed/qatlib/scaffold" / name).read_bytes() == (ROOT / source_name).read_bytes()
    for code in (*RULES, *(code for code, *_ in ERRORS)):
        assert page(code, pages) == page(code, PAGES)
    shutil.rmtree(pages)
    with pytest.raises(StageError, match=f"QAT228 {re.escape(str(pages))}"):
        page("QAT031", pages)


def test_it_needs_no_torch(folder: Path) -> None:
    call = "main(['explain', '31'], standalone_mode=False)"
    ask = f"import sys; from qatlib.cli import main; {call}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", ask], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
