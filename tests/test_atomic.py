"""A folder appears whole, takes the place of its own kind, and of nothing else."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from qatlib.atomic import Contents, atomic_folder, write_csv
from qatlib.errors import OutputError

CONTENTS = Contents(("list.json", "none.json"), ("parts",))


def write(path: str | Path, text: str) -> None:
    with atomic_folder(path, CONTENTS) as folder:
        (folder / "parts").mkdir()
        (folder / "list.json").write_text(text)


def tree(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with its text."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("there", [None, [], ["list.json"], ["none.json"], ["list.json", "parts"]])
def test_a_new_folder_an_empty_one_and_one_of_the_same_kind_are_written(
    tmp_path: Path, there: list[str] | None
) -> None:
    out = tmp_path / "some" / "out"
    if there is not None:
        out.mkdir(parents=True)
        for name in there:
            (out / name).write_text("old")
    write(out, "new")
    assert tree(tmp_path) == {"some/out/list.json": "new"}
    assert sorted(p.name for p in out.iterdir()) == ["list.json", "parts"]


@pytest.mark.parametrize(
    ("there", "seen"),
    [
        (["thesis.txt"], "holds 'thesis.txt'"),
        (["list.json", "thesis.txt"], "holds 'thesis.txt'"),
        (["parts"], "holds 'parts' and no list.json"),
    ],
)
def test_a_folder_of_anything_else_is_left_as_it_is(tmp_path: Path, there: list[str], seen: str) -> None:
    for name in there:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=f"QAT225 .*out: {seen}"):
        write(tmp_path / "out", "new")
    assert tree(tmp_path) == before


def test_a_file_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match=r"QAT225 .*out: is a file"):
        write(tmp_path / "out", "new")
    assert tree(tmp_path) == {"out": "precious"}


@pytest.mark.parametrize("path", [".", "..", "../..", "../here"])
def test_the_working_directory_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    with pytest.raises(OutputError, match=r"QAT225 \.*.*: is the working directory, or holds it"):
        write(path, "new")
    assert Path.cwd() == tmp_path / "above" / "here"


def test_a_link_goes_on_pointing_to_what_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").readlink() == Path("real")
    assert (tmp_path / "real" / "list.json").read_text() == "new"
    (tmp_path / "real" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="QAT225"):
        write(tmp_path / "link", "newer")
    assert (tmp_path / "link" / "list.json").read_text() == "new"


def test_what_the_system_refuses_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match=r"QAT226 .*out: cannot be written \(.*file\)"):
        write(tmp_path / "file" / "out", "new")
    with pytest.raises(OutputError, match="QAT226"), atomic_folder(tmp_path / "out", CONTENTS) as folder:
        (folder / "not there" / "list.json").write_text("new")
    assert tree(tmp_path) == {"file": "precious"}
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(KeyError, match="nothing"), atomic_folder(tmp_path / "out", CONTENTS) as folder:
        (folder / "list.json").write_text({}["nothing"])
    assert tree(tmp_path) == {"out/list.json": "old"}


def test_a_folder_that_cannot_take_the_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source.suffix == ".tmp":
            raise PermissionError(13, os.strerror(13), str(target))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="QAT226"):
        write(tmp_path / "out", "new")
    assert tree(tmp_path) == {"out/list.json": "old"}


def test_csv_has_six_digits_and_empty_cells_for_what_is_not_there(tmp_path: Path) -> None:
    rows = [("a, b", 1_234_567, 1 / 3, None), ('"', -2, math.nan, math.inf), ("", True, 1e-9, 123_456_789.0)]
    write_csv(tmp_path / "t.csv", ["name", "count", "x", "y"], rows)
    assert (tmp_path / "t.csv").read_bytes() == (
        b'name,count,x,y\n"a, b",1234567,0.333333,\n"""",-2,,inf\n,True,1e-09,1.23457e+08\n'
    )
