"""`qatlib golden`: what it reads, and what it never overwrites."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from qatlib.cli import main
from qatlib.golden import load_golden
from qatlib.program import Program
from tests.kind_nets import MASK, NETS, ROWS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Program that reads reals and truth values, and both as .npy."""
    NETS["masks"].program().save(tmp_path / "program")
    np.save(tmp_path / "rows.npy", ROWS.numpy())
    np.save(tmp_path / "mask.npy", MASK.numpy())
    return tmp_path


def golden(folder: Path, out: str | Path) -> Result:
    given = ["--inputs", str(folder / "rows.npy"), "--inputs", str(folder / "mask.npy")]
    return CliRunner().invoke(main, ["golden", str(folder / "program"), *given, "--out", str(out)])


def test_truth_values_are_read(folder: Path) -> None:
    made = golden(folder, folder / "out")
    assert (made.exit_code, made.output) == (0, "")
    inputs = load_golden(folder / "out").tensors
    assert np.array_equal(inputs["y"], MASK.numpy().astype(np.int8))
    assert golden(folder, folder / "out").exit_code == 0, "golden vectors are replaced by golden vectors"


@pytest.mark.parametrize(
    ("out", "seen"),
    [
        ("dl", "QAT225 {out}: holds 'thesis.txt'"),
        ("program", "QAT225 {out}: holds 'constants.safetensors'"),
        ("rows.npy", "QAT225 {out}: is a file"),
        (".", "QAT225 {out}: is the working directory"),
        ("rows.npy/out", "QAT226 {out}: cannot be written"),
    ],
)
def test_nothing_else_is_overwritten(folder: Path, monkeypatch: pytest.MonkeyPatch, out: str, seen: str) -> None:
    monkeypatch.chdir(folder)
    (folder / "dl").mkdir()
    (folder / "dl" / "thesis.txt").write_text("precious")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = golden(folder, out)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith(seen.format(out=out))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    Program.load(folder / "program")
