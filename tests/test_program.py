"""The Program on disk: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qatlib.conversion import IntegerModel, convert_fx, to_program
from qatlib.errors import OutputError, ProgramError
from qatlib.fake.model import FakeQuantModel
from qatlib.program import Op, Program, Value, verify
from qatlib.qtype import BOOL, QType
from tests.models import calibrated, everything, images, model


@pytest.fixture(scope="module")
def net() -> FakeQuantModel:
    return calibrated(everything(), images(8))


@pytest.fixture(scope="module")
def small() -> Program:
    return to_program(calibrated(model(lambda s, x: s.conv(x).relu(), conv=nn.Conv2d(3, 4, 3)), images(4)))


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with the checksum of ``docs/program.md``."""
    bare = {key: value for key, value in document.items() if key != "sha256"}
    return bare | {"sha256": hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()}


def edit(folder: Path, path: list[Any], value: Any, seal: bool) -> None:
    """Set what lies at ``path`` in ``program.json``, or remove it if ``value`` is ``...``."""
    document = json.loads((folder / "program.json").read_text())
    part = document
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    (folder / "program.json").write_text(json.dumps(sealed(document) if seal else document))


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[], ["block.conv", "head"]])
def test_a_loaded_program_gives_the_same_outputs(net: FakeQuantModel, kept: list[str], tmp_path: Path) -> None:
    integer, x = convert_fx(net, kept), images(4, seed=9)
    integer.program.save(tmp_path / "program")
    loaded = Program.load(tmp_path / "program")
    assert torch.equal(IntegerModel(loaded)(x), integer(x))
    loaded.save(tmp_path / "again")
    for name in ("program.json", "constants.safetensors"):
        assert (tmp_path / "program" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_checksum_is_the_one_of_the_docs(small: Program, tmp_path: Path) -> None:
    small.save(tmp_path / "program")
    document = json.loads((tmp_path / "program" / "program.json").read_text())
    assert document == sealed(document)


def test_constants_that_were_left_out_are_given_and_no_others(small: Program, tmp_path: Path) -> None:
    first, *others = sorted(small.constants)
    small.save(tmp_path / "out", without=[first])
    given = {key: tensor + 1 for key, tensor in small.constants.items()}
    loaded = Program.load(tmp_path / "out", given)
    assert torch.equal(loaded.constants[first], given[first])
    assert all(torch.equal(loaded.constants[key], small.constants[key]) for key in others)


def test_saving_replaces_a_program_and_nothing_else(net: FakeQuantModel, small: Program, tmp_path: Path) -> None:
    to_program(net).save(tmp_path / "program")
    (tmp_path / "program" / "golden").mkdir()
    small.save(tmp_path / "program")
    assert Program.load(tmp_path / "program").ops == small.ops
    assert sorted(p.name for p in (tmp_path / "program").iterdir()) == ["constants.safetensors", "program.json"]
    (tmp_path / "program" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"QAT225 .*holds 'thesis.txt'"):
        small.save(tmp_path / "program")
    assert (tmp_path / "program" / "thesis.txt").read_text() == "precious"


def test_a_path_that_cannot_be_written(small: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match="QAT225"):
        small.save(tmp_path / "file")
    with pytest.raises(OutputError, match="QAT226"):
        small.save(tmp_path / "file" / "program")


# -- reading -----------------------------------------------------------------------------------------------------------


def _text(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "program.json").write_bytes(content)


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def _flip(folder: Path) -> None:
    blob = bytearray((folder / "constants.safetensors").read_bytes())
    blob[-1] ^= 1
    (folder / "constants.safetensors").write_bytes(blob)


def _junk(folder: Path) -> None:
    (folder / "constants.safetensors").write_bytes(b"junk" * 9)
    edit(folder, ["constants_sha256"], hashlib.sha256(b"junk" * 9).hexdigest(), seal=True)


def _with(path: list[Any], value: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder, path, value, seal=True)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: (folder / "program.json").rename(folder / "other.json"), "QAT172 .*cannot be read"),
    "json cut": (_cut("program.json"), "QAT172 .*is not JSON"),
    "not UTF-8": (_text(b'{"schema": "\xff"}'), "QAT172 .*is not JSON"),
    "lists too deep": (_text(b"[" * 100_000), "QAT172 .*is not JSON"),
    "a number too long": (_text(b'{"schema": ' + b"9" * 5000 + b"}"), "QAT172 .*is not JSON"),
    "constants cut": (_cut("constants.safetensors"), "QAT172 .*checksum"),
    "one bit": (_flip, "QAT172 .*checksum"),
    "junk with its checksum": (_junk, "QAT172 .*is not a safetensors file"),
    "other schema": (_with(["schema"], 2), "QAT173 .*has schema 2; this version reads 4"),
    "no schema": (_text(b"[]"), "QAT173"),
    "no checksum": (lambda folder: edit(folder, ["sha256"], ..., seal=False), "QAT172 .*program.json: .*checksum"),
    "unknown key": (_with(["extra"], 1), "QAT172 .*extra"),
    "wrong type": (_with(["ops", 0, "inputs"], "x"), "QAT172 .*ops.0.inputs"),
    "unknown value": (_with(["ops", 1, "inputs"], ["nothing"]), "QAT174"),
    "output nobody writes": (_with(["outputs"], ["nothing"]), "QAT174"),
    "constant missing": (_with(["ops", 1, "consts", "weight"], "nothing"), "QAT174"),
}


@pytest.mark.parametrize(("damage", "seen"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_program_is_refused(
    small: Program, tmp_path: Path, damage: Callable[[Path], object], seen: str
) -> None:
    small.save(tmp_path / "program")
    damage(tmp_path / "program")
    with pytest.raises(ProgramError, match=seen) as caught:
        Program.load(tmp_path / "program")
    assert str(caught.value).count("QAT") == 1


EDITS: dict[str, tuple[list[Any], Any]] = {
    "scale": (["values", 2, "scale"], 0.75),
    "lower bound": (["ops", 1, "attrs", "lo"], -5),
    "upper bound beyond the format": (["ops", 1, "attrs", "hi"], 1000),
    "accumulator bound": (["ops", 1, "attrs", "acc_bound"], 1),
    "no stride": (["ops", 1, "attrs", "stride"], ...),
    "stride 0": (["ops", 1, "attrs", "stride"], [0, 0]),
    "shape": (["values", 2, "shape"], [-1, 4, 9, 9]),
    "no multiplier": (["ops", 1, "consts", "multiplier"], ...),
    "no outputs": (["outputs"], []),
    "structure": (["meta", "output_structure"], "zzz"),
    "input given twice": (["ops", 1, "inputs"], ["x.quant", "x.quant"]),
}


@pytest.mark.parametrize(("path", "value"), EDITS.values(), ids=EDITS.keys())
def test_an_edited_program_is_refused(small: Program, tmp_path: Path, path: list[Any], value: Any) -> None:
    small.save(tmp_path / "program")
    edit(tmp_path / "program", path, value, seal=False)
    with pytest.raises(ProgramError, match=r"QAT172 .*program.json: does not have the checksum that it names"):
        Program.load(tmp_path / "program")


def test_another_layout_of_the_same_document_is_read(small: Program, tmp_path: Path) -> None:
    small.save(tmp_path / "program")
    path = tmp_path / "program" / "program.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4, sort_keys=True))
    assert Program.load(tmp_path / "program").ops == small.ops


def test_truth_values_and_codes_of_scale_1_are_told_apart(tmp_path: Path) -> None:
    values = {name: Value(name, (-1, 4), qtype) for name, qtype in (("x", BOOL), ("y", QType("int8", 1.0)))}
    reshape = {name: Op("reshape", f"{name}2", (name,), {"shape": [-1, 2, 2]}) for name in values}
    values |= {f"{name}2": Value(f"{name}2", (-1, 2, 2), value.qtype) for name, value in values.items()}
    program = Program(("x", "y"), ("x2", "y2"), tuple(reshape.values()), values, {})
    program.save(tmp_path / "program")
    written = json.loads((tmp_path / "program" / "program.json").read_text())["values"]
    assert [value["dtype"] for value in written] == ["bool", "int8", "bool", "int8"]
    loaded = Program.load(tmp_path / "program")
    assert loaded == program
    assert loaded.values["x"].qtype != loaded.values["y"].qtype
    with pytest.raises(ValueError, match="QAT141"):
        QType("int8", 0.5, truth=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45, None, "wide"])
def test_a_scale_of_nonsense_is_refused(small: Program, tmp_path: Path, scale: object) -> None:
    small.save(tmp_path / "program")
    edit(tmp_path / "program", ["values", 1, "scale"], scale, seal=True)
    with pytest.raises(ValueError, match=r"QAT140|QAT172"):
        Program.load(tmp_path / "program")


# -- the check ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_constant_that_is_not_finite(net: FakeQuantModel, wrong: float) -> None:
    program = to_program(net, ["head"])
    key = next(op for op in program if op.name == "head").consts["bias"]
    constants = dict(program.constants) | {key: torch.full_like(program.constants[key], wrong)}
    with pytest.raises(ProgramError, match=r"QAT174 head: constant 'bias' is not finite"):
        verify(replace(program, constants=constants))


def test_integer_constants_cost_nothing_to_check(small: Program) -> None:
    """They are finite by nature: tensors without data do."""
    constants = {key: constant.to("meta") for key, constant in small.constants.items()}
    assert all(not constant.is_floating_point() for constant in constants.values())
    verify(replace(small, constants=constants))
