"""The layout of the JSON files that are written for people to read and diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatlib.atomic import write_json

DOCUMENT: dict[str, Any] = {"b": {"ops": []}, "ops": [{"z": 1, "a": [1.5, "ops"]}, {"z": 2}], "a": 0}


@pytest.mark.parametrize(
    ("document", "rows"),
    [(DOCUMENT, ()), (DOCUMENT, "ops"), (DOCUMENT, "none"), ({}, "ops"), ({"ops": []}, "ops"), ([1, 2], ())],
)
def test_the_layout_changes_no_content(tmp_path: Path, document: Any, rows: str | tuple[str, ...]) -> None:
    write_json(tmp_path / "a.json", document, rows)
    assert json.loads((tmp_path / "a.json").read_text()) == document


def test_a_row_is_a_line_with_its_keys_sorted(tmp_path: Path) -> None:
    document = {"ops": DOCUMENT["ops"], "target": "x"}
    write_json(tmp_path / "a.json", document, rows="ops")
    assert (tmp_path / "a.json").read_text() == (
        '{\n  "ops": [\n    {"a": [1.5, "ops"], "z": 1},\n    {"z": 2}\n  ],\n  "target": "x"\n}\n'
    )


@pytest.mark.parametrize("rows", [(), "ops"])
def test_what_is_no_json_number_is_refused_and_nothing_is_written(tmp_path: Path, rows: str | tuple[()]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"ops": [float("nan")]}, rows)
    assert list(tmp_path.iterdir()) == []


def test_several_tables_of_rows(tmp_path: Path) -> None:
    document = {"ops": [{"z": 1}], "parts": [{"a": 2}, {"a": 3}], "none": []}
    write_json(tmp_path / "a.json", document, ("ops", "parts", "none", "absent"))
    assert (tmp_path / "a.json").read_text() == (
        '{\n  "none": [],\n  "ops": [\n    {"z": 1}\n  ],\n  "parts": [\n    {"a": 2},\n    {"a": 3}\n  ]\n}\n'
    )
