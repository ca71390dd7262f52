"""A Program in ONNX Runtime: exported, run with optimizations off and on, compared with the emulator at every value."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qatlib.export import check_onnx, export_onnx
from qatlib.program import Program


def differing(program: Program, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Number of differing elements of the values that have any; every value of the Program has been compared."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.onnx"
        export_onnx(program, path)
        counts = check_onnx(program, path, inputs)
    assert counts.keys() == program.values.keys()
    return {name: count for name, count in counts.items() if count}


def assert_same_in_onnx(program: Program, *inputs: Tensor) -> None:
    assert differing(program, inputs) == {}
