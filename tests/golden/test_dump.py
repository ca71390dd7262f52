"""The files of a dump: matched by name, read, or said to hold no usable tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qatlib.golden import Golden, GoldenError, compare_dump
from qatlib.golden.dump import load_map, match_names
from tests.golden.planting import dump, parted, status


def test_names_match_exactly_by_map_or_without_case_and_punctuation(golden: Golden, tmp_path: Path) -> None:
    folder = dump(golden, tmp_path / "dump", {})
    (folder / "layers").mkdir()
    for old, new in {"block.conv": "Block_CONV", "head.dequant": "out0", "x.quant": "layers/odd", "add": "add"}.items():
        (folder / f"{old}.npy").rename(folder / f"{new}.npy")
    comparison = compare_dump(golden.folder, folder, {"out0.npy": "head.dequant"})
    files = {result.name: result.file for result in comparison.tensors}
    assert (files["block.conv"], files["head.dequant"], files["x.quant"]) == ("Block_CONV.npy", "out0.npy", "")
    assert comparison.unknown_files == ("layers/odd",)
    assert comparison.unused_names == ()
    assert comparison.equal


def test_a_mapped_file_goes_before_one_of_the_golden_name(golden: Golden, tmp_path: Path) -> None:
    """The device's own "stem" is another tensor; names of the map without a file are told."""
    folder = dump(golden, tmp_path / "dump", {})
    (folder / "stem.npy").rename(folder / "conv1_out.npy")
    np.save(folder / "STEM.npy", np.zeros(3))
    comparison = compare_dump(golden.folder, folder, {"conv1_out": "stem", "conv2_out": "stem", "conv3_0ut": "add"})
    assert comparison.equal
    assert next(r.file for r in comparison.tensors if r.name == "stem") == "conv1_out.npy"
    assert comparison.unknown_files == ("STEM",)
    assert comparison.unused_names == ("conv2_out", "conv3_0ut")


def test_two_names_may_be_exchanged_by_a_map(golden: Golden, tmp_path: Path) -> None:
    folder = dump(golden, tmp_path / "dump", {"stem": golden.tensors["add"], "add": golden.tensors["stem"]})
    assert compare_dump(golden.folder, folder, {"stem": "add", "add": "stem"}).equal


def test_a_plain_name_of_two_tensors_matches_neither() -> None:
    with pytest.raises(GoldenError, match="QAT204"):
        match_names({"a_b": Path("a_b.npy")}, ["a.b", "a/b"])
    assert match_names({"a_b": Path("a_b.npy")}, ["a.b", "a/b"], {"a_b": "a/b"}) == {"a/b": Path("a_b.npy")}


@pytest.mark.parametrize(
    ("names", "name_map", "code"),
    [
        (["stem.npy"], {"stem": "stam"}, "QAT203.*stam"),
        (["stem.npy", "STEM.npy"], None, "QAT203.*claimed by"),
        (["a.npy", "b.npy"], {"a": "stem", "b": "stem"}, "QAT203.*claimed by"),
        (["stem.npy", "stem.bin"], None, "QAT203.*same name"),
        (["conv_17.npy"], None, "QAT204"),
        (["stem.txt"], None, "QAT202"),
    ],
)
def test_names_that_cannot_be_used(
    golden: Golden, tmp_path: Path, names: list[str], name_map: dict[str, str] | None, code: str
) -> None:
    for name in names:
        np.save(tmp_path / "x.npy", golden.tensors["stem"])
        (tmp_path / "x.npy").rename(tmp_path / name)
    with pytest.raises(GoldenError, match=code):
        compare_dump(golden.folder, tmp_path, name_map)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "a: 1", None])
def test_a_map_that_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(GoldenError, match="QAT203"):
        load_map(tmp_path / "map.yaml")


UNUSABLE: dict[str, tuple[Any, str]] = {
    "truncated": (b"\0" * 1000, "has 1000 bytes, truncated; int8 [5, 8, 16, 16] has 10240"),
    "empty": (b"", "has 0 bytes, truncated"),
    "too long": (b"\0" * 10304, "has 10304 bytes; int8 [5, 8, 16, 16] has 10240"),
    "other shape": (np.zeros((5, 7, 16, 16), np.int8), "has shape [5, 7, 16, 16], golden is [5, 8, 16, 16]"),
    "more samples": (np.zeros((6, 8, 16, 16), np.int8), "has shape [6, 8, 16, 16]"),
    "no samples": (np.zeros((0, 8, 16, 16), np.int8), "has shape [0, 8, 16, 16]"),
    "a number": (np.array(5), "has shape []"),
    "text": (np.array(["a"]), "is not an array of numbers"),
    "complex": (np.zeros((5, 8, 16, 16), np.complex64), "is not an array of numbers"),
}


@pytest.mark.parametrize(("content", "reason"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_file_without_a_usable_tensor(golden: Golden, tmp_path: Path, content: Any, reason: str) -> None:
    comparison = parted(golden, tmp_path, {"stem": content})
    result = next(r for r in comparison.tensors if r.name == "stem")
    assert (result.status, comparison.equal) == ("unusable", False)
    assert reason in result.note
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("stem", "file")
    assert status(comparison)["block.conv"] == "equal"


def test_files_that_cannot_be_read(golden: Golden, tmp_path: Path) -> None:
    folder = dump(golden, tmp_path / "dump", {})
    (folder / "stem.npy").write_bytes((folder / "stem.npy").read_bytes()[:-100])
    np.save(folder / "add.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "cat.npy").write_bytes(b"")
    states = status(compare_dump(golden.folder, folder))
    assert {name for name, state in states.items() if state == "unusable"} == {"stem", "add", "cat"}
