"""`qatlib apply`: the edit of every rule goes into params.yaml, which keeps its comments, loads, and takes it once."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from qatlib.analysis.apply import plan
from qatlib.analysis.findings import Finding, Found
from qatlib.analysis.rules import run_rules
from qatlib.cli import main
from qatlib.errors import ConfigError
from qatlib.pipeline.config import load_config
from tests.analysis.planted import CLEAN, PLANTED

ROOT = Path(__file__).parents[2]
PARAMS = [ROOT / "params.yaml", *(p for p in ROOT.glob("examples/*/params.yaml") if p.parent.name != "fashion_mnist")]


def finding(edit: str, code: str = "QAT008", module: str = "conv2") -> Finding:
    return Finding(code, "warning", "title", module, {}, edit, "dvc exp run --temp")


def record(match: str = "conv2", **settings: Any) -> Finding:
    return finding(
        f"qconfig:\n  overrides:\n    - match: '{match}'\n" + "".join(f"      {k}: {v}\n" for k, v in settings.items())
    )


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return Path("params.yaml")


def values(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path)


def comments(text: str) -> list[str]:
    return re.findall(r"(?:^|\s)#.*$", text, re.M)


def assert_holds(document: Any, edit: Any) -> None:
    """Whether everything that ``edit`` sets is so in ``document``."""
    if isinstance(edit, dict):
        for key, value in edit.items():
            assert_holds(document[key], value)
    elif isinstance(edit, list) and edit and isinstance(edit[0], dict):
        assert document[: len(edit)] == edit
    else:
        assert document == edit


@pytest.mark.parametrize(("code", "severity", "module", "fault"), PLANTED)
def test_the_edit_of_every_rule_is_applied_or_told(
    code: str, severity: str, module: str, fault: dict[str, Any], params: Path
) -> None:
    for found in run_rules(replace(CLEAN, **fault)):
        shutil.copy(ROOT / "params.yaml", params)
        before = params.read_text()
        if not re.fullmatch(r"\w+:", found.edit.split("\n")[0]):
            with pytest.raises(ConfigError, match=r"QAT230 .*" + re.escape(found.edit)):
                plan(found, params)
            continue
        plan(found, params).write()
        load_config(params)
        assert_holds(values(params), YAML(typ="safe").load(found.edit))
        assert [c.strip() for c in comments(params.read_text())] == [c.strip() for c in comments(before)]
        again = plan(found, params)
        assert (again.diff, again.after) == ("", params.read_text())


@pytest.mark.parametrize("source", PARAMS, ids=lambda path: path.parent.name)
def test_only_the_lines_of_the_edit_change(source: Path, params: Path) -> None:
    shutil.copy(source, params)
    edit = "convert:\n  tables:\n    - match: act\n      segments: 32\nqat:\n  lr: 3.0e-5\n  hybrid: ['a.b']"
    diff = plan(finding(edit), params).diff
    removed = [line for line in diff.splitlines() if re.match(r"-(?!--)", line)]
    added = [line for line in diff.splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len(removed) == (3 if "lr" in values(params)["qat"] else 2)
    assert len(added) == 5
    assert [line.split("#")[0].rstrip() for line in added if not line.startswith("+  tables")] == [
        "+  lr: 3.0e-5",
        "+  hybrid: ['a.b']",
        "+    - match: act",
        "+      segments: 32",
    ]


def test_a_record_is_updated_where_it_stands_else_comes_first(params: Path) -> None:
    for change in (record("a.*", activation="int16"), record("b", scale=0.5), record("a.*", weight="int16")):
        plan(change, params).write()
    assert values(params)["qconfig"]["overrides"] == [
        {"match": "b", "scale": 0.5},
        {"match": "a.*", "activation": "int16", "weight": "int16"},
    ]
    assert load_config(params).qconfig.overrides[0].match == "b"


def test_comments_between_records_stay_with_them(params: Path) -> None:
    records = "    - match: x      # the left\n      scale: 0.5\n\n    - match: y\n      scale: 0.25   # the right\n"
    text = params.read_text().replace("  inputs: []  ", f"  inputs:\n    # of the camera\n{records} #")
    params.write_text(text)
    plan(finding("qconfig:\n  inputs:\n    - match: z\n      activation: int16"), params).write()
    after = params.read_text()
    assert [r["match"] for r in values(params)["qconfig"]["inputs"]] == ["z", "x", "y"]
    assert "- match: x      # the left\n" in after
    assert "scale: 0.25   # the right\n" in after


def test_names_are_added_once_and_an_empty_list_empties(params: Path) -> None:
    for names in ("['a.b']", "[c]", "['a.b', d]"):
        plan(finding(f"qat:\n  hybrid: {names}"), params).write()
    assert values(params)["qat"]["hybrid"] == ["d", "c", "a.b"]
    plan(finding("qat:\n  hybrid: []"), params).write()
    assert values(params)["qat"]["hybrid"] == []
    plan(finding("qat:\n  milestones: [0.25, 0.75]"), params).write()
    assert values(params)["qat"]["milestones"] == [0.25, 0.75], "numbers are no names"


def test_a_section_that_is_not_there_is_added(params: Path) -> None:
    params.write_text('model: {factory: "m:b", checkpoint: w.pt, code: m.py}\ndata: {factory: "d:b", code: d.py}\n')
    plan(record(activation="int16"), params).write()
    assert load_config(params).qconfig.overrides[0].activation == "int16"
    assert params.read_text().startswith('model: {factory: "m:b", checkpoint: w.pt, code: m.py}\n')


def test_the_indentation_of_the_file_is_kept(params: Path) -> None:
    text = 'model: {factory: "m:b", checkpoint: w.pt, code: m.py}\ndata: {factory: "d:b", code: d.py}\n'
    text += "qconfig:\n  overrides:\n  - match: a\n    scale: 0.5\nqat:\n  distill: null\n"
    params.write_text(text)
    assert plan(record("b", scale=0.25), params).after == text.replace(
        "  - match: a\n", "  - match: 'b'\n    scale: 0.25\n  - match: a\n"
    )


def test_what_would_not_load_is_not_written(params: Path) -> None:
    before = params.read_bytes()
    for edit in ("qat:\n  lr: -1", "qat:\n  rate: 1", "qconfig:\n  overrides:\n    - match: a"):
        with pytest.raises(ConfigError, match=r"QAT231 params\.yaml"):
            plan(finding(edit), params)
    params.write_bytes(before + b"qatt: {}\n")
    with pytest.raises(ConfigError, match="QAT101"):
        plan(record(scale=0.5), params)


# -- the command -------------------------------------------------------------------------------------------------------


def apply(found: Found, *arguments: str) -> Result:
    Path("reports").mkdir(exist_ok=True)
    Path("reports/findings.json").write_text(json.dumps(found.document()))
    return CliRunner().invoke(main, ["apply", *arguments])


FOUND = Found(
    (finding("qat:\n  lr: 1.0e-5", "QAT031", ""), record("a", scale=0.5), replace(record("b", scale=0.5), module="b"))
)


def test_the_command_prints_the_diff_and_writes_once(params: Path) -> None:
    before = params.read_bytes()
    shown = apply(FOUND, "31", "--dry-run")
    assert "+  lr: 1.0e-5" in shown.output
    assert "dvc exp run --temp" in shown.output
    assert params.read_bytes() == before
    shown = apply(FOUND, "QAT031")
    assert (shown.exit_code, shown.output.count("+  lr: 1.0e-5")) == (0, 1)
    assert shown.output.endswith("run next: dvc repro\n")
    written = params.read_bytes()
    assert load_config(params).qat.lr == 1e-5
    shown = apply(FOUND, "QAT031")
    assert (shown.exit_code, shown.output) == (0, "params.yaml holds this edit already; run: dvc repro\n")
    assert params.read_bytes() == written
    assert [path.name for path in Path.cwd().iterdir()].count("params.yaml") == len(list(Path.cwd().glob("*yaml*")))


def test_without_a_code_the_first_edit_that_is_not_there_is_taken(params: Path) -> None:
    sentence = finding("Train it longer", "QAT012", "")
    found = replace(FOUND, findings=(sentence, *FOUND.findings))
    for wanted in ("QAT031 ", "QAT008 conv2", "QAT008 b"):
        shown = apply(found)
        assert (shown.exit_code, shown.output.partition(":")[0]) == (0, wanted)
    assert load_config(params).qat.lr == 1e-5
    assert [record["match"] for record in values(params)["qconfig"]["overrides"]] == ["b", "a"]
    shown = apply(found)
    assert (shown.exit_code, shown.stderr.partition(",")[0]) == (1, "QAT229 reports/findings.json: has no finding")
    assert "--module needs the code" in apply(found, "--module", "b").stderr


def test_one_of_several_findings_is_named_by_its_module(params: Path) -> None:
    assert apply(FOUND, "QAT008", "--module", "b").exit_code == 0
    assert values(params)["qconfig"]["overrides"] == [{"match": "b", "scale": 0.5}]


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["QAT008"], "QAT229 QAT008: has 2 findings. Give --module as one of conv2, b."),
        (["QAT008", "--module", "c"], "QAT229 QAT008: is not found in 'c'. Give --module as one of conv2, b."),
        (["QAT009"], "QAT229 QAT009: is no finding of reports/findings.json. Its findings are QAT031, QAT008."),
    ],
)
def test_a_finding_that_cannot_be_meant_is_one_message(params: Path, arguments: list[str], seen: str) -> None:
    before = params.read_bytes()
    shown = apply(FOUND, *arguments)
    assert (shown.exit_code, shown.stderr) == (1, f"{seen}\n")
    assert params.read_bytes() == before
