"""The rows of bench/reference.py: those of the stages, written as they come, and what becomes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML
from torch import Tensor

from bench.reference import Reference, main, measure, read_models, ways
from bench.rows import METHODS, Row, markdown, read_rows, write_rows
from qatlib.errors import ConfigError, StageError
from qatlib.pipeline.checkpoint import save_tensors
from stages import calibrate, convert, float_check, qat
from tests.pipeline import tiny
from tests.pipeline.conftest import ROOT, SETTINGS

TINY = {
    "model": {"factory": "tests.pipeline.tiny:build_model", "checkpoint": "float.safetensors", "code": "params.yaml"},
    "data": {"factory": "tests.pipeline.tiny:build_data", "code": "params.yaml", "batch_size": 64},
    "compile": {"target": str(ROOT / "qatlib" / "targets" / "bayes-like.yaml"), "check_images": 16},
}


def write_params(folder: Path, **over: Any) -> None:
    document = {**SETTINGS, **TINY, "calibrate": {**SETTINGS["calibrate"], "equalize": True}}
    for section, values in over.items():
        document[section] = {**document.get(section, {}), **values}
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(document, file)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tiny.train()


@pytest.fixture
def folder(weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, the working directory."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    save_tensors("float.safetensors", weights)
    write_params(tmp_path)
    return tmp_path


def scores(rows: list[Row], form: str, method: str) -> tuple[float | None, float | None, int]:
    (row,) = [row for row in rows if row.form == form and row.method == method]
    return row.fake_quant, row.integer, row.items


def of_stages(fake_quant: str, **over: Any) -> tuple[float, float, int]:
    """The same from the metric files after the stages ran in the working directory."""
    write_params(Path.cwd(), **over)
    for stage in (calibrate, qat, convert):
        stage.main.main([], standalone_mode=False)
    scored, integer = (
        next(iter(json.loads(Path(f"reports/{name}/metrics.json").read_text()).values()))
        for name in (fake_quant, "convert")
    )
    return scored["accuracy"], integer["accuracy"], integer["images"]


def test_rows_are_what_the_stages_score(folder: Path) -> None:
    rows_file = folder / "rows.csv"
    measure({"tiny": Reference(folder=str(folder), params={"runtime": {"threads": 1}})}, rows_file, [3], False)
    rows = read_rows(rows_file)
    assert [row.form for row in rows] == ["float", *["ptq"] * len(METHODS), "qat"]
    assert scores(rows, "qat", "percentile") == of_stages("qat", runtime={"seed": 3})
    trained = json.loads(Path("reports/qat/metrics.json").read_text())["qat"]
    last = rows[-1]
    assert (last.seed, last.epochs, last.lr) == (3, 2, 0.01)
    assert (last.best_epoch, last.train_items) == (trained["best_epoch"], trained["train_images"])
    assert scores(rows, "ptq", "kl") == of_stages("calibrate", calibrate={"method": "kl"}, qat={"epochs": 0})
    float_check.main.main([], standalone_mode=False)
    in_float = json.loads(Path("reports/float_check/metrics.json").read_text())["float"]
    assert (rows[0].in_float, rows[0].items) == (in_float["accuracy"], in_float["images"])


def test_a_run_that_was_killed_goes_on(folder: Path) -> None:
    models = {"tiny": Reference(folder=str(folder), params={"qat": {"epochs": 1}})}
    whole, rows_file = folder / "whole.csv", folder / "rows.csv"
    measure(models, whole, [0], False)
    other, old = (Row(name, "accuracy", 5, "float", in_float=0.5) for name in ("another", "tiny"))
    write_rows(rows_file, [other, old])
    measured: list[str] = []

    def killed(line: str) -> None:
        measured.append(line)
        if len(measured) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(models, rows_file, [0], False, killed)
    assert read_rows(rows_file) == [other, *read_rows(whole)[:4]]
    marked = [replace(row, integer=0.125) if row.form == "ptq" else row for row in read_rows(rows_file)]
    write_rows(rows_file, marked)
    measure(models, rows_file, [0], True, measured.append)
    assert read_rows(rows_file) == [*marked, *read_rows(whole)[4:]]
    assert len(measured) == len(ways([0]))


def test_every_metric_has_its_row_and_no_epochs_give_none_of_qat(folder: Path) -> None:
    names = ("qatlib.pipeline.metrics:Accuracy", "tests.bench.test_reference:Images")
    model = Reference(folder=str(folder), metrics=names, params={"qat": {"epochs": 0}})
    measure({"tiny": model}, folder / "rows.csv", [0], False)
    rows = read_rows(folder / "rows.csv")
    assert [row.metric for row in rows] == ["accuracy", "images"] * (1 + len(METHODS))
    assert {row.form for row in rows} == {"float", "ptq"}
    assert rows[3].integer == rows[1].in_float == tiny.SIZES["test"]


class Images:
    """A metric that counts."""

    name, higher_is_better = "images", True

    def __init__(self) -> None:
        self.seen = 0

    def update(self, outputs: Any, targets: Any) -> None:
        self.seen += len(targets)

    def compute(self) -> float:
        return float(self.seen)


# -- the table -------------------------------------------------------------------------------------------------

ROWS = [
    Row("a", "accuracy", 1000, "float", in_float=0.9),
    Row("a", "accuracy", 1000, "ptq", "kl", fake_quant=0.8, integer=0.81),
    Row("a", "accuracy", 1000, "qat", "kl", 0, 2, 1, 1e-3, 5000, fake_quant=0.8, integer=0.85),
    Row("a", "accuracy", 1000, "qat", "kl", 1, 2, 2, 1e-3, 5000, fake_quant=0.9, integer=0.86),
    Row("a", "noise_db", 1000, "float", in_float=90.04),
]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", ROWS)
    assert read_rows(tmp_path / "rows.csv") == ROWS
    assert read_rows(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    "text", ["example,metric\n", "HEAD\na,accuracy,many,ptq,kl,,,,,,,,\n", "HEAD\na,accuracy\n", ""]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    write_rows(tmp_path / "rows.csv", [])
    head = (tmp_path / "rows.csv").read_text().strip()
    (tmp_path / "rows.csv").write_text(text.replace("HEAD", head))
    with pytest.raises(StageError, match="QAT195"):
        read_rows(tmp_path / "rows.csv")


def test_the_table_has_means_and_says_what_was_not_run() -> None:
    lines = markdown(ROWS, ["a", "b"]).splitlines()
    blank = " | ".join(["not run"] * 3)
    assert f"| a | accuracy, 1,000 | fake-quant | 0.9000 | {blank} | 0.8000 | not run | not run | 0.8500 |" in lines
    assert f"|  |  | integer |  | {blank} | 0.8100 | not run | not run | 0.8550 |" in lines
    assert f"| a | noise_db, 1,000 | fake-quant | 90.0 dB | {' | '.join(['not run'] * 7)} |" in lines
    assert f"| b | not run | fake-quant | {' | '.join(['not run'] * 8)} |" in lines
    assert "| a | accuracy | kl | 2 | 0.001 | 5,000 | 1, 2 | 0.8000 / 0.8500 | 0.9000 / 0.8600 |" in lines


# -- the command -----------------------------------------------------------------------------------------------


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_a_name_or_seed_that_is_none(tmp_path: Path) -> None:
    assert "warp" in command("wrap").output
    assert "'0,x'" in command("warp", "--seeds", "0,x").output


def test_models_that_are_wrong_are_named(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("a: {folder: ., metrics: [accuracy], parameters: {}}\n")
    with pytest.raises(ConfigError, match=r"QAT101 .*2 wrong\n  a\.metrics\.0.*\n  a\.parameters"):
        read_models(path)
    path.write_text("a: [")
    assert "QAT100" in command("--models", str(path)).output


def test_a_float_model_that_was_never_trained(folder: Path) -> None:
    Path("float.safetensors").unlink()
    Path("models.yaml").write_text(f"tiny: {{folder: {folder}}}\n")
    done = command("--models", "models.yaml", "--rows", "rows.csv")
    assert (done.exit_code, "QAT120" in done.output) == (1, True)
