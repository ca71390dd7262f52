"""Golden vectors: what is written, what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qatlib.conversion import convert_fx
from qatlib.emulator import emulate
from qatlib.errors import ProgramError
from qatlib.golden import Golden, GoldenError, compare_dump, load_golden, write_golden
from qatlib.program import Program
from tests.golden.planting import BATCH, dump
from tests.models import calibrated, images, model


def test_what_is_written_is_what_the_emulator_computes(program: Program, golden: Golden) -> None:
    x = images(BATCH, seed=3)
    _, values = emulate(program, x, trace=True)
    assert golden.batch == BATCH
    assert [entry.name for entry in golden.entries] == ["x", *(op.output for op in program.ops)]
    for name, value in values.items():
        entry, array = golden.by_name[name], golden.tensors[name]
        assert np.array_equal(array, value.numpy())
        assert (str(array.dtype), array.shape) == (entry.dtype, entry.shape)
        assert entry.scale == program.values[name].qtype.scale
    manifest = json.loads((golden.folder / "manifest.json").read_text())
    given = manifest["statistics"]["x"]["given"]
    assert given["mean"] == pytest.approx(float(x.double().mean()))
    assert given["std"] == pytest.approx(float(x.double().std(correction=0)))
    codes = manifest["statistics"]["x"]["quantized"]["x.quant"]
    assert (codes["min"], codes["max"]) == (float(values["x.quant"].min()), float(values["x.quant"].max()))


def test_writing_twice_gives_the_same_bytes(program: Program, golden: Golden, tmp_path: Path) -> None:
    write_golden(program, images(BATCH, seed=3), tmp_path / "again")
    for path in golden.folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(golden.folder)).read_bytes()


def test_a_number_keeps_its_shape(tmp_path: Path) -> None:
    net = model(lambda s, x: s.l(x) * 2.0, l=nn.Linear(4, 4))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    write_golden(convert_fx(calibrated(net, x)).program, x, tmp_path / "golden")
    golden = load_golden(tmp_path / "golden")
    (number,) = (entry for entry in golden.entries if entry.kind == "constant")
    assert (number.shape, golden.tensors[number.name].shape, golden.samples(number.name, 2).shape) == ((), (), ())


def test_nothing_is_left_of_a_refused_write(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="QAT181"):
        write_golden(program, torch.full((1, 3, 16, 16), torch.nan), tmp_path / "golden")
    with pytest.raises(GoldenError, match="QAT205"):
        write_golden(program, images(0), tmp_path / "golden")
    assert list(tmp_path.iterdir()) == []


def test_fewer_samples_are_those_of_a_smaller_batch(nets: dict[str, Golden], tmp_path: Path) -> None:
    """Wherever the batch is: the second axis, or merged into another, before it or behind."""

    def body(s: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = x.transpose(0, 1)
        return s.o(turned), s.o(turned.reshape(-1, 8))

    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    program = convert_fx(calibrated(model(body, o=nn.Linear(8, 5)), x)).program
    write_golden(program, x, tmp_path / "golden")
    golden = load_golden(tmp_path / "golden")
    assert {entry.template for entry in golden.entries} >= {(6, -1, 5), (-6, 5)}
    for name, value in emulate(program, x[:2], trace=True)[1].items():
        assert np.array_equal(golden.samples(name, 2), value.numpy())


def _edit(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"stem"', '"stam"'))


def _version(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"schema": 1', '"schema": 7'))


def _flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        blob = bytearray((folder / name).read_bytes())
        blob[-3] ^= 1
        (folder / name).write_bytes(blob)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "QAT200"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "QAT200"),
    "manifest cut": (lambda folder: (folder / "manifest.json").write_text("{"), "QAT201"),
    "manifest edited": (_edit, "QAT201.*edited"),
    "other version": (_version, "QAT201.*schema 7"),
    "values changed": (_flip("values.safetensors"), "QAT201.*values"),
    "inputs changed": (_flip("inputs.safetensors"), "QAT201.*inputs"),
    "program changed": (_flip("program/constants.safetensors"), "QAT201.*constants"),
    "values missing": (lambda folder: (folder / "values.safetensors").unlink(), "QAT201.*cannot be read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_golden_vectors_are_refused(
    golden: Golden, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(golden.folder, tmp_path / "golden")
    damage(tmp_path / "golden")
    with pytest.raises(GoldenError, match=message):
        load_golden(tmp_path / "golden")


def test_a_program_folder_is_no_golden_folder(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="QAT200"):
        compare_dump(golden.folder / "program", dump(golden, tmp_path / "dump", {}))
