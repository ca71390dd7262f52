"""`qatlib tune` from the command line: files, diff, errors in one line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qatlib.cli import main
from qatlib.pipeline.stage import lock
from tests.tune.conftest import Planted


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", "--images", "128", *arguments])


def front() -> list[dict[str, str]]:
    return list(csv.DictReader(Path("tune/front.csv").read_text().splitlines()))


def test_the_files_of_a_search(planted: Planted) -> None:
    done = tune()
    assert done.exit_code == 0, done.output
    rows = front()
    assert [row["point"] for row in rows] == ["now", *map(str, range(1, len(rows)))]
    (best,) = [row for row in rows if row["best"] == "1"]
    assert best["pareto"] == "1"
    assert "a: int16" in best["choice"]
    diff = Path("tune/params.diff").read_text()
    assert diff.count("+    - match: a") == 1
    assert diff in done.output
    assert Path("tune/front.svg").read_text().count("<svg") == 1
    assert Path("tune/front.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.read_bytes() for path in Path("tune").iterdir()}
    assert tune().exit_code == 0
    assert {path: path.read_bytes() for path in Path("tune").iterdir()} == before, "a finished search changes nothing"

    assert tune("--write").exit_code == 0
    assert "match: a" in Path("params.yaml").read_text()
    stale = tune()
    assert (stale.exit_code, stale.stderr.count("\n")) == (1, 1)
    assert stale.stderr.startswith("QAT127 artifacts/qat.safetensors")


def test_another_point_and_experiments(planted: Planted) -> None:
    done = tune("--dvc")
    assert done.exit_code == 0, done.output
    commands = Path("tune/trials.sh").read_text().splitlines()
    assert commands
    assert all(line.startswith("dvc exp run --temp -S ") and line in done.output for line in commands)
    assert not any(row["metric"] for row in front()), "nothing is measured"
    last = len(front())
    assert "chosen: " in tune("--dvc", "--point", str(last)).output
    failed = tune("--dvc", "--point", "99")
    assert (failed.exit_code, failed.stderr) == (
        1, f"QAT259 --point: is 99; the front has {last} points. Give a number of the table.\n",
    )  # fmt: skip


@pytest.mark.parametrize("group", ["a", "nowhere"])
def test_groups(planted: Planted, group: str) -> None:
    done = tune("--dvc", "--group", group)
    if group == "a":
        assert done.exit_code == 0, done.output
    else:
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("QAT144 group 'nowhere'")


def test_no_budget(planted: Planted) -> None:
    done = tune("--budget", "0")
    assert done.exit_code == 0, done.output
    assert "everything left; run it again to go on" in " ".join(done.output.split())
    assert not Path("tune/params.diff").exists()


def test_a_second_search_beside_it_is_refused(planted: Planted) -> None:
    with lock("tune"):
        refused = tune()
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("QAT190")


def test_without_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = tune()
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("QAT100")
