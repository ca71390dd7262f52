"""`qatlib check`: what it says before calibration is what the stages then do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from ruamel.yaml import YAML
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.analysis.check import PARTS, Section, check
from qatlib.cli import main
from qatlib.compiler import check_model, load_target
from qatlib.fake.calibrate import calibrate
from qatlib.fake.formats import format_rows
from qatlib.pipeline.checkpoint import save_tensors
from qatlib.pipeline.config import load_config
from qatlib.pipeline.conversion import program_of
from qatlib.pipeline.project import Project
from tests.pipeline import tiny

ROOT = Path(__file__).parents[2]


class Odd(nn.Module):
    """A convolution that is called twice, a batch norm behind a relu, and a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.same = nn.Conv2d(4, 4, 3, padding=1)
        self.late = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(F.relu(self.stem(x)))
        return self.head(torch.sigmoid(self.same(self.same(x)).mean((2, 3))))


class Stack(nn.Module):
    """Four convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(1, 2, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


def build_stack() -> nn.Module:
    return Stack()


def build_odd() -> nn.Module:
    torch.manual_seed(0)
    return Odd()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tests/pipeline/tiny.py as a project; returns its folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    save_tensors("float.safetensors", tiny.build_model().state_dict())
    write()
    return tmp_path


def write(model: str = "tests.pipeline.tiny:build_model", **sections: Any) -> None:
    document = {
        "model": {"factory": model, "checkpoint": "float.safetensors", "code": "m.py"},
        "data": {"factory": "tests.pipeline.tiny:build_data", "code": "m.py"},
        "compile": {"target": str(ROOT / "qatlib/targets/bayes-like.yaml")},
        **sections,
    }
    with Path("params.yaml").open("w") as file:
        YAML().dump(document, file)


def odd(**sections: Any) -> None:
    save_tensors("float.safetensors", build_odd().state_dict())
    write("tests.analysis.test_check:build_odd", **sections)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments])


def section(part: str) -> Section:
    (found,) = check(Project(load_config()), part)
    return found


def test_a_sound_project_has_no_errors_and_nothing_is_written(project: Path) -> None:
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    shown = run()
    assert shown.exit_code == 0, shown.output
    assert shown.output.rstrip().endswith("0 errors")
    assert "Model TinyNet with inputs [1, 1, 8, 8]" in shown.output
    for title, _ in PARTS.values():
        assert title in shown.output
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_formats_are_those_that_calibration_then_gives(project: Path) -> None:
    overrides = [{"match": "body", "activation": "int16"}, {"match": "stem", "scale": 0.125}]
    write(qconfig={"overrides": overrides, "inputs": [{"match": "x", "scale": 0.0078125}]}, calibrate={"method": "mse"})
    rows = {row[0]: row for row in section("qconfig").rows}
    opened = Project(load_config())
    model = opened.fake_quant_model()
    calibrate(model, opened.calibration_batches())
    for row in format_rows(model):
        shown = rows[row.op]
        assert (shown[2], shown[3], shown[5], shown[6], shown[7], shown[8]) == (
            row.inputs, row.output, row.output_rule, row.weight, row.weight_rule, row.message,
        )  # fmt: skip
        assert row.scale is None or shown[4] in (f"{row.scale:.6g}", f"calibration: {row.observer}", row.observer)
    assert len(rows) == len(format_rows(model))
    assert rows["body"][3:6] == ("int16", "calibration: mse", "qconfig.overrides[0]")
    assert rows["stem"][3:6] == ("int8", "0.125", "qconfig.overrides[1]")
    assert rows["x.quant"][4:6] == ("0.0078125", "qconfig.inputs[0]")
    assert rows["max_pool2d"][4] == "0.125", "that of its input"
    assert rows["flatten"][4] == "as adaptive_avg_pool2d"


def test_many_inputs_of_one_dtype_are_counted(project: Path) -> None:
    write("tests.analysis.test_check:build_stack")
    save_tensors("float.safetensors", build_stack().state_dict())
    (row,) = (row for row in section("qconfig").rows if row[1] == "cat")
    assert row[2] == "4 × int8"


def test_shared_and_unfused_modules_are_named(project: Path) -> None:
    odd()
    assert section("shared").rows == [("same", "Conv2d", "2", str(4 * 4 * 9 + 4))]
    (row,) = section("fuse").rows
    assert (row[0], row[1]) == ("late", "BatchNorm2d")
    assert "test_check.py" in row[-1]
    write()
    save_tensors("float.safetensors", tiny.build_model().state_dict())
    assert (section("shared").rows, section("fuse").rows) == ([], [])


def test_the_target_refuses_what_it_refuses_after_calibration(project: Path) -> None:
    write(qat={"hybrid": ["body"]})
    found = section("target")
    opened = Project(load_config())
    model = opened.fake_quant_model()
    calibrate(model, opened.calibration_batches())
    expected = check_model(program_of(opened, model), load_target(opened.config.compile.target))
    assert found.errors == tuple(map(str, expected))
    assert {row[0] for row in found.rows} == {"QAT187"}
    shown = run("target")
    assert shown.exit_code == 1
    assert "body" in shown.output


def test_what_ranges_decide_is_no_error(project: Path) -> None:
    tables = [{"match": "sigmoid", "range": [500.0, 1000.0]}]
    odd(convert={"tables": tables}, qconfig={"default": {"activation": "int16"}})
    found = section("target")
    assert (found.errors, found.rows) == ((), ())
    assert "Not known before calibration" in found.note
    assert "QAT213" in found.note
    assert run().exit_code == 0


def test_an_error_is_told_once_and_hides_no_other_part(project: Path) -> None:
    odd(qconfig={"overrides": [{"match": "sten", "scale": 0.5}]}, metric={"factory": "tests:nothing"})
    shown = run()
    assert shown.exit_code == 1
    assert shown.output.count("QAT102 qconfig.overrides[0].match: 'sten' matches nothing") == 1
    assert shown.output.count("QAT103") == 1
    assert "2 errors" in shown.output
    assert "BatchNorm2d" in shown.output, "fusion is looked at all the same"


def test_without_trained_weights_the_rest_is_looked_at(project: Path) -> None:
    whole = check(Project(load_config()))
    Path("float.safetensors").unlink()
    without = check(Project(load_config()))
    assert [error[:6] for section in without for error in section.errors] == ["QAT120"]
    assert without[1:] == whole
    assert run("fuse").exit_code == 1


def test_a_wrong_config_or_model_is_one_message(project: Path) -> None:
    write(qat={"lrr": 1})
    shown = run()
    assert (shown.exit_code, shown.stderr[:6]) == (1, "QAT101")
    write("tests.pipeline.tiny:no_such")
    shown = run()
    assert (shown.exit_code, shown.output.count("QAT103")) == (1, 1)
    assert shown.output.rstrip().endswith("1 error")


@pytest.mark.parametrize("part", PARTS)
def test_one_part_is_that_section_of_all(project: Path, part: str) -> None:
    whole = dict(zip(PARTS, check(Project(load_config())), strict=True))
    assert section(part) == whole[part]
    assert run(part).exit_code == 0


def test_the_command_offers_every_part() -> None:
    (argument,) = (each for each in main.commands["check"].params if each.name == "part")
    assert list(argument.type.choices) == list(PARTS)  # type: ignore[attr-defined]
