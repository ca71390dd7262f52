"""What would rerun and why, on a pipeline of three small stages; and what a revision left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from qatlib.analysis.revision import WORKSPACE, load_revision
from qatlib.cli import main
from qatlib.errors import StageError
from qatlib.pipeline.why import MISSING, ParamChange, Why, outdated, why
from tests.pipeline.conftest import Repository

PIPELINE = """stages:
  last:
    cmd: cat made/second > third
    deps: [made]
    params: [c]
    outs: [third]
  first:
    cmd: cat source > one
    deps: [source]
    params: [a]
    outs: [one]
  second:
    cmd: mkdir -p made && cat one > made/second
    deps: [one]
    params: [b]
    outs: [made]
"""
PARAMS = "a: {lr: 1, list: [1]}\nb: 2\nc: 3\n"
EMPTY = '{"findings": [], "ignored": [], "notes": []}'


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A project in a folder of a git repository, run and committed. Copy it before changing it."""
    root = tmp_path_factory.mktemp("why")
    (root / "project" / "reports").mkdir(parents=True)
    repository = Repository(root)
    inner = Repository(root / "project")
    for name, text in (("dvc.yaml", PIPELINE), ("params.yaml", PARAMS), ("source", "x\n")):
        (inner.folder / name).write_text(text)
    repository.run("git", "init", "-q", "-b", "main")
    repository.run("dvc", "init", "-q")
    repository.run("dvc", "config", "core.analytics", "false")
    inner.run("dvc", "repro", "-q")
    (inner.folder / "reports" / "summary.json").write_text('{"metric": "accuracy"}')
    (inner.folder / "reports" / "findings.json").write_text(EMPTY)
    repository.run("git", "add", "-A")
    repository.run("git", "commit", "-qm", "results")
    return repository


@pytest.fixture
def project(done: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = done.copy(tmp_path / "copy").folder / "project"
    monkeypatch.chdir(folder)
    return folder


def found() -> dict[str, Why]:
    return {one.stage: one for one in why()}


def test_nothing_runs_after_a_run(project: Path) -> None:
    assert why() == [Why("first"), Why("second"), Why("last")], "in the order in which they run"
    assert outdated(why()) == []


def test_a_parameter_shows_both_values_and_what_follows(project: Path) -> None:
    (project / "params.yaml").write_text("a: {lr: 5, list: [1, 2]}\nb: 2\nc: 3\n")
    stages = found()
    assert stages["first"].params == (
        ParamChange("params.yaml", "a.lr", 1, 5),
        ParamChange("params.yaml", "a.list", [1], [1, 2]),
    )
    assert stages["second"] == Why("second", after=("first",))
    assert stages["last"] == Why("last", after=("second",))
    assert outdated(why()) == ["first", "second", "last"]


def test_keys_that_came_and_went(project: Path) -> None:
    (project / "params.yaml").write_text("a: {list: [1], new: 0}\nb: 2\nc: 3\n")
    assert found()["first"].params == (
        ParamChange("params.yaml", "a.new", MISSING, 0),
        ParamChange("params.yaml", "a.lr", 1, MISSING),
    )


def test_files_commands_and_outputs(project: Path) -> None:
    (project / "source").write_text("y\n")
    (project / "dvc.yaml").write_text(PIPELINE.replace("cat one > made/second", "cp one made/second"))
    (project / "third").unlink()
    stages = found()
    assert stages["first"].inputs == ("source changed",)
    assert stages["second"].inputs == ("its command changed: mkdir -p made && cp one made/second",)
    assert stages["last"].outputs == ("third, which it makes, is missing",)
    assert (stages["last"].inputs, stages["last"].runs) == ((), True)


def test_results_that_are_not_there_are_not_outdated(project: Path) -> None:
    """As in a clone without `dvc pull`: everything would run, but the reports are those of the parameters."""
    for name in ("one", "third"):
        (project / name).unlink()
    shutil.rmtree(project / "made")
    assert all(one.runs for one in why())
    assert outdated(why()) == []


def test_what_never_ran_says_so(project: Path) -> None:
    (project / "dvc.lock").unlink()
    assert [one.inputs for one in why()] == [("it never ran",)] * 3


def test_one_stage_with_those_before_it(project: Path) -> None:
    assert [one.stage for one in why("second")] == ["first", "second"]


@pytest.mark.parametrize("gone", ["stage", "pipeline", "repository"])
def test_what_is_not_there_is_one_message(project: Path, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if gone == "pipeline":
        (project / "dvc.yaml").unlink()
    if gone == "repository":
        shutil.rmtree(project.parent / ".dvc")
    done = CliRunner().invoke(main, ["why", "nothing"] if gone == "stage" else ["why"])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("QAT219 ")


def test_the_terminal_and_json_tell_the_same(project: Path) -> None:
    (project / "params.yaml").write_text(PARAMS.replace("b: 2", "b: 4"))
    shown = CliRunner().invoke(main, ["why"]).output
    assert "params.yaml: b was 2, is 4" in shown
    assert "dvc repro runs up to 2 of 3 stages" in shown
    stages = {one["stage"]: one for one in json.loads(CliRunner().invoke(main, ["why", "--json"]).output)}
    assert stages["second"]["params"] == [{"file": "params.yaml", "key": "b", "old": 2, "new": 4}]
    assert [name for name, one in stages.items() if one["runs"]] == ["second", "last"]


# -- revisions ---------------------------------------------------------------------------------------------------------


def test_a_revision_is_read_in_this_folder(project: Path) -> None:
    (project / "params.yaml").write_text("a: 9\n")
    (project / "reports" / "analysis.json").write_text("{}")
    then, now = load_revision("main"), load_revision(WORKSPACE)
    assert (then.params, then.analysis) == (PARAMS, None)
    assert (now.params, now.analysis) == ("a: 9\n", {})
    assert then.summary == now.summary == {"metric": "accuracy"}


def test_an_experiment_is_known_by_its_name(project: Path) -> None:
    repository = Repository(project)
    base = repository.run("git", "rev-parse", "HEAD").stdout.strip()
    (project / "params.yaml").write_text("a: 9\n")
    repository.run("git", "commit", "-qam", "experiment")
    repository.run("git", "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/nimble-newt", "HEAD")
    repository.run("git", "reset", "-q", "--hard", base)
    assert load_revision("nimble-newt").params == "a: 9\n"
    assert load_revision(base[:10]).params == PARAMS


def test_a_revision_that_there_is_none_or_has_no_reports(project: Path) -> None:
    Repository(project).run("git", "rm", "-qr", "--cached", "reports")
    Repository(project).run("git", "commit", "-qm", "no reports")
    with pytest.raises(StageError, match=r"^QAT219 revision nothing: .*unknown Git revision"):
        load_revision("nothing")
    with pytest.raises(StageError, match=r"^QAT219 revision HEAD: has no reports/summary\.json"):
        load_revision("HEAD")
    (project / "reports" / "findings.json").write_text("[1, 2]")
    with pytest.raises(StageError, match=r"^QAT195 reports/findings\.json"):
        load_revision(WORKSPACE)


@pytest.mark.parametrize("arguments", [["compare", "..b"], ["compare", "a.."], ["report", "--md", "--json"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2
