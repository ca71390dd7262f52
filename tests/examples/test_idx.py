from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.fashion_mnist.idx import FILES, IdxFile, decode
from qatlib.errors import DataError
from tests.examples.conftest import encode

CONTENT = encode(np.arange(60).reshape(3, 4, 5))
FILE = IdxFile("some-idx3-ubyte", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_decode_gives_the_encoded_array(shape: list[int]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode(array)), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        b"\0\0\x0d\x01\0\0\0\0",
        b"\x1f\x8b\x08\0rest",
        b"\0\0\x08\x03\0\0\0\x01",
        CONTENT[:-1],
        CONTENT + b"\0",
    ],
)
def test_decode_refuses_what_is_no_whole_idx_file(content: bytes) -> None:
    with pytest.raises(DataError, match="QAT117 here: "):
        decode(content, "here")


@pytest.mark.parametrize("name", ["file", "file.gz"])
def test_read_returns_checked_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(CONTENT) if name.endswith(".gz") else CONTENT)
    assert FILE.read(path) == CONTENT


ALTERED = {
    "truncated": (CONTENT[:-7], f"holds {len(CONTENT) - 7} bytes; some-idx3-ubyte has {len(CONTENT)}"),
    "longer": (CONTENT + b"more than this", f"holds .*bytes; some-idx3-ubyte has {len(CONTENT)}"),
    "altered": (CONTENT[:-1] + b"\xff", f"has SHA-256 .*; some-idx3-ubyte has {FILE.sha256}"),
    "empty": (b"", "holds 0 bytes"),
}


@pytest.mark.parametrize("case", ALTERED)
@pytest.mark.parametrize("packed", [False, True])
def test_read_refuses_other_content(tmp_path: Path, case: str, packed: bool) -> None:
    content, message = ALTERED[case]
    path = tmp_path / ("file.gz" if packed else "file")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=f"QAT117 {path}: {message}"):
        FILE.read(path)


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(CONTENT)[:-9], gzip.compress(CONTENT)[:20], b"<html>", CONTENT],
    ids=["without its end", "begun", "a page", "not packed"],
)
def test_read_refuses_a_damaged_gzip_file(tmp_path: Path, packed: bytes) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"QAT117 .*is not a whole gzip file"):
        FILE.read(path)


def test_the_table_lists_the_four_files_of_the_dataset() -> None:
    pixels = 28 * 28
    assert {name: file.size for name, file in FILES.items()} == {
        "train-images-idx3-ubyte": 16 + 60_000 * pixels,
        "train-labels-idx1-ubyte": 8 + 60_000,
        "t10k-images-idx3-ubyte": 16 + 10_000 * pixels,
        "t10k-labels-idx1-ubyte": 8 + 10_000,
    }
