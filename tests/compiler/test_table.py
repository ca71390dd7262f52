"""A Program on several targets: `qatlib perf` and the table behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qatlib.cli import main
from qatlib.cli.perf_view import accuracy_ratio
from qatlib.compiler import check_model, compile_model, load_target
from qatlib.compiler.table import HEADINGS, cells, markdown, on_targets
from tests.kind_nets import NETS

PROGRAM = NETS["masks"].program()
TAKES = "bayes-like"


def perf(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["perf", *arguments])


def test_a_row_is_what_the_compiler_says() -> None:
    executable = compile_model(PROGRAM, TAKES)
    (row,) = on_targets(PROGRAM, [TAKES])
    seen = executable.performance
    assert (row.target, row.latency_us, row.fps, row.dram_bytes) == (TAKES, seen.latency_us, seen.fps, seen.dram_bytes)
    assert row.sram_peak_bytes == max(
        place.offset + place.size for place in executable.memory.places.values() if place.arena == "sram"
    )
    assert row.refused == ""


def test_a_refusal_is_a_row_with_codes_and_numbers_of_ops() -> None:
    violations = check_model(PROGRAM, load_target("bernoulli-like"))
    assert violations
    (row,) = on_targets(PROGRAM, ["bernoulli-like"])
    assert row.refusals == violations
    assert row.latency_us is row.dram_bytes is None
    for code in {one.code for one in violations}:
        count = len({one.op for one in violations if one.code == code})
        assert f"{code} ({count} op" in row.refused
    assert markdown([cells(row)], HEADINGS).count("\n") == 3


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    PROGRAM.save("artifacts/program")
    return tmp_path


def test_the_command_shows_targets_in_the_order_given(project: Path) -> None:
    shown = perf("--target", "nash-like", "--target", TAKES, "--target", "bernoulli-like")
    assert shown.exit_code == 0, shown.output
    places = [shown.output.index(name) for name in ("nash-like", TAKES, "bernoulli-like")]
    assert places == sorted(places)
    assert "Accuracy" not in shown.output, "there is no report"
    assert "not a measurement" in shown.output

    document = json.loads(perf("--json", "--target", TAKES, "--target", "bernoulli-like").output)
    assert [row["target"] for row in document["targets"]] == [TAKES, "bernoulli-like"]
    assert document["targets"][0]["refusals"] == []
    assert document["targets"][1]["refusals"][0].keys() == {"code", "op", "seen", "fix"}
    assert perf("--md", "--target", TAKES).output.startswith("| target | latency, µs |")


def test_the_ratio_is_shown_where_the_report_is_fresh(project: Path) -> None:
    summary = project / "reports" / "summary.json"
    summary.parent.mkdir()
    summary.write_text(json.dumps({"stale": [], "ratio": {"integer": 0.98765}}))
    assert "0.9877 of float" in perf("--target", TAKES).output
    summary.write_text(json.dumps({"stale": ["integer"], "ratio": {"integer": 0.98765}}))
    assert "of float" not in perf("--target", TAKES).output
    summary.write_text("[")
    assert accuracy_ratio(summary) is None


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["--target", "bayes-lik"], "QAT183 bayes-lik: is neither a file nor a shipped target (did you mean"),
        (["nowhere", "--target", TAKES], "QAT172"),
        ([], "QAT100"),
    ],
)
def test_errors_are_one_line(project: Path, arguments: list[str], seen: str) -> None:
    failed = perf(*arguments)
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith(seen)
