"""A stand-in for Fashion-MNIST: as many images as the real one, 2×2, the pixels of each holding its number."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from examples.fashion_mnist import fetch, idx
from examples.fashion_mnist.fetch import Contents, UnavailableError

pytest.register_assert_rewrite("tests.examples.integer")


def encode(array: np.ndarray) -> bytes:
    """An idx file of unsigned bytes."""
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def _part(name: str, count: int) -> Contents:
    numbers = np.arange(count)
    pixels = numbers.astype(">u4").view(np.uint8).reshape(count, 2, 2)
    return {f"{name}-images-idx3-ubyte": encode(pixels), f"{name}-labels-idx1-ubyte": encode(numbers % 10)}


@pytest.fixture(scope="session")
def contents() -> Contents:
    return _part("train", 60_000) | _part("t10k", 10_000)


def write_folder(folder: Path, contents: Contents, packed: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(
            gzip.compress(content, 1, mtime=0) if packed else content
        )
    return folder


@pytest.fixture
def cache(contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache folder, empty, of a process for which the stand-in is the dataset and no other place has it."""

    def nowhere(*_: object) -> Contents:
        raise UnavailableError("not in this test")

    files = {
        name: idx.IdxFile(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()
    }
    monkeypatch.setattr(idx, "FILES", files)
    monkeypatch.setattr(fetch, "INSTALLED", tmp_path / "not installed")
    monkeypatch.setattr(fetch, "from_debian_package", nowhere)
    monkeypatch.setattr(fetch, "from_official", nowhere)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qatlib-examples" / "fashion-mnist"


@pytest.fixture
def root(cache: Path, contents: Contents, tmp_path: Path) -> Path:
    """Folder with the stand-in, decompressed."""
    return write_folder(tmp_path / "root", contents, packed=False)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Function that puts a shell script of some name first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def write(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    return write
