"""The pipeline as users run it: dvc repro, experiments, interruptions, bad input."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import Repository

STAGES = ["float_check", "calibrate", "qat", "convert", "compile_sim", "analyze"]


def read(repository: Repository, path: str) -> Any:
    return json.loads((repository.folder / path).read_text())


def at(repository: Repository, revision: str, path: str) -> Any:
    return json.loads(repository.run("git", "show", f"{revision}:{path}").stdout)


def experiment(repository: Repository, *settings: str) -> tuple[str, set[str]]:
    """Run one in a temporary copy; return its revision and the stages that ran."""
    changes = [part for setting in settings for part in ("-S", setting)]
    done = repository.run("dvc", "exp", "run", "--temp", "-n", "trial", *changes)
    ran = {name for name in STAGES if f"Running stage '{name}'" in done.stdout}
    refs = repository.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    return next(ref for ref in refs if ref.endswith("/trial")), ran


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_repro_ends_with_the_ratios_and_exact_integers(finished: Repository) -> None:
    summary = read(finished, "reports/summary.json")
    assert set(summary["ratio"]) == {"calib", "qat", "integer", "compiled"}
    assert all(0.9 <= ratio <= 1.1 for ratio in summary["ratio"].values())
    assert summary["missing"] == summary["stale"] == []
    assert {summary[stage]["images"] for stage in ("float", "calib", "qat", "integer", "compiled")} == {256}
    compiled = read(finished, "reports/compile_sim/metrics.json")["compiled"]
    assert compiled["differing_elements"] == 0
    assert compiled["check_images"] == 16
    assert compiled["latency_us"] > 0


def test_repro_of_what_is_done_does_nothing(finished: Repository) -> None:
    done = finished.run("dvc", "repro")
    assert "Running stage" not in done.stdout
    assert "up to date" in done.stdout
    assert finished.run("git", "status", "--porcelain").stdout == ""


def test_metric_files_are_flat_sorted_and_finite(finished: Repository) -> None:
    for path in sorted((finished.folder / "reports").glob("*/metrics.json")):
        ((_, values),) = json.loads(path.read_text()).items()
        assert list(values) == sorted(values)
        assert all(isinstance(value, int | float) for value in values.values())
        assert "images" in values


def test_the_terminal_shows_the_result_and_the_gate_judges_it(finished: Repository) -> None:
    shown = finished.run("qatlib", "summary").stdout
    for word in ("float", "calibrated", "QAT", "integer", "compiled", "latency", "profiler.html"):
        assert word in shown
    assert finished.run("qatlib", "gate").returncode == 0


def test_the_gate_fails_closed(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    summary = read(repository, "reports/summary.json")
    del summary["ratio"]["integer"]
    (repository.folder / "reports/summary.json").write_text(json.dumps(summary))
    done = repository.run("qatlib", "gate", check=False)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    (repository.folder / "reports/summary.json").unlink()
    done = repository.run("qatlib", "gate", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("QAT195")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_stage_measures_what_each_op_costs(finished: Repository) -> None:
    folder = finished.folder / "reports/analyze"
    seen = rows(folder / "sensitivity.csv")
    ops = list(dict.fromkeys(row["op"] for row in seen))
    assert ops == ["(none)", "(all)", "x", "stem", "body", "adaptive_avg_pool2d", "head"]
    (whole,) = (float(row["sqnr_db"]) for row in seen if row["op"] == "(all)")
    steps = rows(folder / "steps.csv")
    assert float(steps[-1]["first_sqnr_db"]) == whole
    assert {row["mode"] for row in rows(folder / "bad_cases.csv")} == {"FvsQ", "QvsQ"}
    assert [row["op"] for row in rows(folder / "conversion_loss.csv")][:2] == ["(none)", "(all)"]
    assert 'id="sensitivity"' in (finished.folder / "reports/profiler.html").read_text()


def test_the_command_measures_what_is_asked_for(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    done = repository.run(
        "qatlib", "sensitivity", "--top", "2", "--images", "32", "--metric", "--out", str(tmp_path / "o")
    )
    assert "32 samples" in done.stdout
    seen = rows(tmp_path / "o/sensitivity.csv")
    assert len({row["op"] for row in seen} - {"(none)", "(all)"}) == 2
    assert all(0.0 <= float(row["metric"]) <= 1.0 for row in seen)
    assert repository.run("git", "status", "--porcelain").stdout == ""
    for options, code in ((["--group", "nothing"], "QAT144"), ([], "QAT")):
        if not options:
            shutil.rmtree(repository.folder / "artifacts")
        refused = repository.run("qatlib", "sensitivity", *options, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert refused.stderr.startswith(code)


def test_the_study_is_switched_off_by_one_value(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    repository.set(analyze={"sensitivity": None})
    repository.stage("analyze")
    written = sorted((repository.folder / "reports/analyze").iterdir())
    assert [path.name for path in written] == ["bad_cases.csv", "conversion_loss.csv", "sensitivity.csv", "steps.csv"]
    assert all(rows(path) == [] for path in written)


def test_neighbours_of_the_last_run_are_compared_op_by_op(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    shown = repository.run("qatlib", "profile", "QvsQ", "--images", "40").stdout
    assert "fake-quant and integer" in shown
    for path in ("qat.safetensors", "program"):
        (repository.folder / "artifacts" / path).rename(tmp_path / path)
    shown = repository.run("qatlib", "profile", "CvsQ", "--out", str(tmp_path / "o")).stdout
    assert "calibrated and integer" in shown, "it needs nothing of QAT"
    seen = {row["Module Name"]: row for row in rows(tmp_path / "o/similarity-CvsQ.csv")}
    assert {"stem", "body", "head"} <= set(seen)
    assert all(float(row["Op Error with Same Input (N out_qscale)"] or 0) <= 1 for row in seen.values())
    assert repository.run("git", "status", "--porcelain").stdout == ""
    refused = repository.run("qatlib", "profile", "QvsQ", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)


def test_what_would_run_and_what_changed_are_told(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    assert "dvc repro runs 0 of 6 stages" in repository.run("qatlib", "why").stdout
    shown = repository.run("qatlib", "report", "--md").stdout
    written = (repository.folder / "reports/summary.md").read_text()
    evidence = re.compile("^Evidence: .*$", re.MULTILINE)
    assert evidence.sub("", shown) == evidence.sub("", written)
    for one, other in zip(evidence.findall(shown), evidence.findall(written), strict=True):
        assert sorted(re.split(": |, ", one)) == sorted(re.split(": |, ", other)), "JSON orders its keys"
    repository.set(qat={"lr": 0.5})
    why = repository.run("qatlib", "why").stdout
    assert "params.yaml: qat.lr was 0.01, is 0.5" in why
    assert "runs up to 4 of 6 stages" in why
    document = json.loads(repository.run("qatlib", "report", "--base", "HEAD", "--json").stdout)
    assert document["outdated"] == ["qat", "convert", "compile_sim", "analyze"]
    assert document["params"] == [{"key": "qat.lr", "base": 0.01, "head": 0.5}]
    assert document["ops"] == {"changed": [], "new": [], "gone": []}
    assert repository.run("git", "status", "--porcelain").stdout.split() == ["M", "params.yaml"]


# -- experiments -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_learning_rate_reruns_qat_and_what_follows(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    revision, ran = experiment(repository, "qat.lr=0.002")
    assert ran == {"qat", "convert", "compile_sim", "analyze"}
    before = (finished.folder / "reports/qat/history.csv").read_text()
    after = repository.run("git", "show", f"{revision}:reports/qat/history.csv").stdout
    assert before != after
    assert repository.run("git", "status", "--porcelain").stdout == ""
    assert "qat.lr" in repository.run("dvc", "exp", "diff", "--md").stdout or "0.002" in repository.run(
        "dvc", "exp", "show", "--csv"
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_an_edit_that_was_tried_is_measured(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    findings = read(repository, "reports/findings.json")["findings"]
    finding = next(one for one in findings if one["edit"].startswith("calibrate:\n  batches: "))
    revision, _ = experiment(repository, "calibrate.batches=64")
    document = json.loads(repository.run("qatlib", "compare", "HEAD..trial", "--json").stdout)
    assert finding["code"] in [row["code"] for row in document["trials"]["rows"]]
    then, now = (at(repository, rev, "reports/summary.json")["integer"]["accuracy"] for rev in ("HEAD", revision))
    assert document["trials"]["measured"]["metric"] == pytest.approx(now - then)
    assert document["params"] == [{"key": "calibrate.batches", "base": 2, "head": 64}]
    assert "Measured (integer): accuracy" in repository.run("qatlib", "compare", "HEAD..trial", "--md").stdout


@pytest.mark.slow
def test_hybrid_keeps_the_named_op_in_float(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    revision, ran = experiment(repository, "qat.hybrid=[body]")
    assert "float_check" not in ran
    assert {"calibrate", "qat", "convert", "analyze"} <= ran
    assert at(repository, revision, "reports/convert/metrics.json")["integer"]["float_islands"] == 1
    refused = at(repository, revision, "reports/compile_sim/refusals.json")["refusals"]
    assert "QAT187" in {r["code"] for r in refused}
    assert all("body" in r["op"] for r in refused)
    assert at(repository, revision, "reports/summary.json")["missing"] == ["compiled"]


@pytest.mark.slow
def test_preserve_reruns_no_training(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    revision, ran = experiment(repository, "convert.preserve=[stem,head]")
    assert ran == {"convert", "compile_sim", "analyze"}
    assert at(repository, revision, "reports/convert/metrics.json")["integer"]["float_islands"] == 2
    codes = [f["code"] for f in at(repository, revision, "reports/findings.json")["findings"]]
    assert "QAT020" in codes


@pytest.mark.slow
def test_an_unknown_module_stops_with_a_suggestion(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    done = repository.run("dvc", "exp", "run", "--temp", "-S", "convert.preserve=[boddy]", check=False)
    assert done.returncode != 0
    assert "QAT102" in done.stdout + done.stderr
    assert "'body'" in done.stdout + done.stderr


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bytes(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    repository.set(qat={"epochs": 60, "lr": 0.003})
    command = [sys.executable, "-m", "stages.qat"]
    process = subprocess.Popen(command, cwd=repository.folder, env=repository.environment, stderr=subprocess.DEVNULL)
    resume = list((repository.folder / ".qatlib").glob("scratch/*/resume.safetensors"))
    deadline = time.time() + 120
    while not resume and time.time() < deadline:
        time.sleep(0.05)
        resume = list((repository.folder / ".qatlib").glob("scratch/*/resume.safetensors"))
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert resume, "killed before the first checkpoint"
    outputs = [repository.folder / path for path in ("artifacts/qat.safetensors", "reports/qat/history.csv")]
    repository.stage("qat")
    resumed = [digest(path) for path in outputs]
    assert not resume[0].exists(), "scratch is removed once the outputs are written"
    repository.stage("qat")
    assert [digest(path) for path in outputs] == resumed
    assert read(repository, "reports/qat/metrics.json")["qat"]["best_epoch"] > 0


@pytest.mark.slow
def test_two_at_once_is_one_clear_message(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    repository.set(qat={"epochs": 200})
    command = [sys.executable, "-m", "stages.qat"]
    first = subprocess.Popen(command, cwd=repository.folder, env=repository.environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 60
        while not (repository.folder / ".qatlib/locks/qat.pid").exists() and time.time() < deadline:
            time.sleep(0.05)
        second = repository.stage("qat", check=False)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith("QAT190 stage qat: is already running here as process")


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "missing checkpoint": ({"model": {"checkpoint": "none.safetensors"}}, "float_check", "QAT120"),
    "other classes": ({"model": {"kwargs": {"classes": 7}}}, "float_check", "QAT125"),
    "NaN in data": ({"data": {"kwargs": {"spoil": "nan"}}}, "calibrate", "QAT112"),
    "labels out of range": ({"data": {"kwargs": {"spoil": "labels"}}}, "calibrate", "QAT113"),
    "empty loader": ({"data": {"kwargs": {"spoil": "empty"}}}, "calibrate", "QAT110"),
    "string for a list": ({"qat": {"hybrid": "body"}}, "calibrate", "QAT101"),
    "unknown module": ({"qat": {"hybrid": ["nobody"]}}, "calibrate", "QAT102"),
    "inner high precision": (
        {"qconfig": {"overrides": [{"match": "stem", "high_precision": True}]}},
        "calibrate",
        "QAT145",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_nothing_written(case: str, fresh: Repository, tmp_path: Path) -> None:
    settings, stage, code = BAD[case]
    repository = fresh.copy(tmp_path / "p")
    repository.set(**settings)
    done = repository.stage(stage, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(code), done.stderr
    assert "Traceback" not in done.stderr
    assert not (repository.folder / "artifacts").exists()
    assert not list((repository.folder / "reports").glob("**/*")) if (repository.folder / "reports").exists() else True


@pytest.mark.slow
def test_a_label_that_only_training_meets_names_the_step(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    repository.set(data={"kwargs": {"spoil": "late train label"}})
    done = repository.stage("qat", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("QAT113 epoch 1 step")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_step_and_rate(finished: Repository, tmp_path: Path) -> None:
    repository = finished.copy(tmp_path / "p")
    before = digest(repository.folder / "artifacts/qat.safetensors")
    repository.set(qat={"lr": 1e12, "schedule": "constant"})
    done = repository.stage("qat", check=False)
    assert done.returncode == 1
    first, *cures = done.stderr[done.stderr.index("QAT162 epoch 1 step") :].splitlines()
    assert "(lr 1e+12, items " in first
    assert [line[:4] for line in cures] == ["  1.", "  2.", "  3.", "  4.", "  Or"]
    assert digest(repository.folder / "artifacts/qat.safetensors") == before
