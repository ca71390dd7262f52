"""A choice in params.yaml: the diff gives what was measured, and keeps what it does not change."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from qatlib.errors import ConfigError
from qatlib.fake.calibrate import calibrate
from qatlib.pipeline.config import load_config
from qatlib.pipeline.conversion import program_of
from qatlib.pipeline.project import Project
from qatlib.program import Program
from qatlib.tune.edit import change_of, command_of
from qatlib.tune.space import HIGH, Choice, Option, Space, choice_of, key_of
from tests.tune.conftest import Planted

WIDE = Option("int16", "int8")
ACCUMULATOR = Option(HIGH, "int8")


def rerun() -> Program:
    """What `dvc repro` would make of params.yaml."""
    project = Project(load_config())
    model = project.fake_quant_model()
    calibrate(model, project.calibration_batches())
    return program_of(project, model)


def same(a: Program, b: Program) -> bool:
    constants = a.constants.keys() == b.constants.keys() and all(
        torch.equal(a.constants[k], b.constants[k]) for k in a.constants
    )
    return a.ops == b.ops and a.values == b.values and constants


CHOICES: dict[str, tuple[dict[str, Any], Choice]] = {
    "one output": ({}, {"a": WIDE, "c": ACCUMULATOR}),
    "the input": ({}, {"x": Option("int16"), "c": ACCUMULATOR}),
    "weights": ({}, {"b": Option("int8", "int16"), "c": ACCUMULATOR}),
    "both, and the output of the network": ({}, {"a": Option("int16", "int16"), "c": WIDE}),
    "narrowest": ({}, {}),
    "a glob that holds too much": (
        {"overrides": [{"match": "[ab]", "activation": "int16"}]}, {"a": WIDE, "c": ACCUMULATOR},
    ),
    "a record that goes": (
        {"overrides": [{"match": "b", "activation": "int16"}, {"match": "a", "weight": "int8"}]}, {"c": ACCUMULATOR},
    ),
    "a record that has more": (
        {"overrides": [{"match": "b", "activation": "int16", "weight": "int16"}]},
        {"b": Option("int8", "int16"), "c": ACCUMULATOR},
    ),
    "high precision by a record": (
        {"outputs": {"high_precision": False}, "overrides": [{"match": "c", "high_precision": True}]}, {"c": WIDE},
    ),
    "high precision asked for": ({"outputs": {"high_precision": False}}, {"a": WIDE, "c": ACCUMULATOR}),
    "int16 by default": ({"default": {"activation": "int16", "weight": "int8"}}, {"a": WIDE, "c": ACCUMULATOR}),
    "an input that was wide": ({"inputs": [{"match": "x", "activation": "int16"}]}, {"a": WIDE, "c": ACCUMULATOR}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_the_diff_gives_the_program_that_was_measured(planted: Planted, name: str) -> None:
    qconfig, choice = CHOICES[name]
    planted.set(qconfig=qconfig)
    planted.ship()
    space = Space(Project(load_config()))
    measured = space.program(choice)
    change = change_of(space, choice)
    assert Path("params.yaml").read_text() == change.before, "nothing is written before it is asked for"
    change.write()
    again = rerun()
    assert same(again, measured)
    after = Space(Project(load_config())) if not change.diff else None
    assert after is None or change_of(after, choice).diff == ""


def test_what_is_there_already_is_no_change(planted: Planted) -> None:
    space = Space(Project(load_config()))
    assert change_of(space, space.present()).diff == ""


def test_comments_stay_and_records_without_effect_go(planted: Planted) -> None:
    planted.set(qconfig={"overrides": [{"match": "[ab]", "activation": "int16"}]})
    text = Path("params.yaml").read_text().replace("calibrate:", "# of the data\ncalibrate:")
    Path("params.yaml").write_text(text)
    planted.ship()
    change = change_of(Space(Project(load_config())), {"c": ACCUMULATOR})
    assert "# of the data" in change.after
    records = YAML().load(change.after)["qconfig"]["overrides"]
    assert [dict(record) for record in records] == [
        {"match": "a", "activation": "int8"}, {"match": "b", "activation": "int8"},
    ]  # fmt: skip


def test_the_same_as_an_experiment(planted: Planted) -> None:
    space = Space(Project(load_config()))
    change = change_of(space, {"a": WIDE, "x": Option("int16"), "c": ACCUMULATOR})
    words = shlex.split(command_of(change))
    assert words[:3] == ["dvc", "exp", "run"]
    assert words[-1] == "compile_sim"
    settings = {word.split("=", 1)[0]: YAML().load(word.split("=", 1)[1]) for word in words if "=" in word}
    after = YAML().load(change.after)["qconfig"]
    assert settings == {"qconfig.overrides": after["overrides"], "qconfig.inputs": after["inputs"]}


def test_a_choice_survives_its_key() -> None:
    choice = {"b": WIDE, "a": Option("", "int16")}
    assert choice_of(key_of(choice)) == choice
    assert key_of(choice) == key_of(dict(reversed(choice.items())))


def test_an_edit_that_would_not_load_is_refused(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(Project(load_config()))
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("epochs: 0", "epochs: -1"))
    with pytest.raises(ConfigError, match=r"^QAT231 params\.yaml: would not be legal"):
        change_of(space, {"a": WIDE})
