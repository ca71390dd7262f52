"""An ONNX document of a Program, run by ONNX Runtime and compared with the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto
from torch import Tensor

from qatlib.emulator import emulate
from qatlib.errors import ProgramError
from qatlib.export.graph import Array
from qatlib.program import Program

OFF = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
ON = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


@dataclass(frozen=True)
class Distance:
    """How far a tensor is from the Program's: share of equal elements, largest difference in LSB of its format."""

    equal: float
    largest_lsb: float


def check_onnx(program: Program, path: str | Path, inputs: Tensor | Sequence[Tensor]) -> dict[str, int]:
    """Number of elements that differ from the emulator's, for every value of ``program``.

    The document runs with graph optimizations off and on, each time with every value as an output, and once more as it
    is, when the runtime may fuse most; the largest number counts. A wrong shape or dtype counts every element.
    Behind a float island a difference is possible, elsewhere none is right. Raises ProgramError (QAT224) if ``path`` is
    not an ONNX document of this Program.
    """
    expected = {name: value.numpy() for name, value in _emulated(program, inputs).items()}
    feeds = _feeds(program, inputs)
    model = _load(path)
    opened = _with_every_value(model, program, path)
    counts = dict.fromkeys(expected, 0)
    for document, level in ((opened, OFF), (opened, ON), (model, ON)):
        for name, got in _run(document, feeds, level, path).items():
            counts[name] = max(counts[name], _differing(expected[name], got))
    return counts


def measure_distance(
    program: Program, path: str | Path, inputs: Tensor | Sequence[Tensor], optimize: bool = True
) -> dict[str, Distance]:
    """Distance from the emulator of every int8 and int16 value and of every output of a ``qdq`` document.

    A dequantized output is measured in LSB of what it was dequantized from. ``optimize`` lets ONNX Runtime use its int8
    kernels; without, it computes in float. Outputs are those of the document as it is; inner values are read from a run
    with all of them as outputs, in which fewer nodes can be fused.
    """
    expected = {name: value.numpy() for name, value in _emulated(program, inputs).items()}
    model, feeds, level = _load(path), _feeds(program, inputs), ON if optimize else OFF
    got = _run(_with_every_value(model, program, path), feeds, level, path) | _run(model, feeds, level, path)
    distances = {}
    for name, want in expected.items():
        unit = _lsb(program, name)
        if unit is not None and name not in program.inputs:
            apart = np.abs(got[name].astype(np.float64) - want.astype(np.float64)) / unit
            distances[name] = Distance(float(np.mean(apart < 0.5)), float(apart.max(initial=0.0)))
    return distances


def _lsb(program: Program, name: str) -> Any:
    """Difference between neighbours in value ``name``: 1 for codes, the scale for reals, None for floats."""
    if program.values[name].qtype.scale is not None:
        return 1.0
    op = program.producer(name)
    if op is None or op.kind != "dequantize":
        return None
    scale = program.values[op.inputs[0]].qtype.scale
    return program.constant(op, "scale").double().numpy() if scale is None else scale


def _emulated(program: Program, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    return emulate(program, inputs, trace=True)[1]


def _feeds(program: Program, inputs: Tensor | Sequence[Tensor]) -> dict[str, Array]:
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    dtypes = [program.values[name].qtype.dtype for name in program.inputs]
    arrays = [x.detach().cpu().numpy().astype(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
    return dict(zip(program.inputs, arrays, strict=True))


def _differing(want: Array, got: Array) -> int:
    if (want.dtype, want.shape) != (got.dtype, got.shape):
        return max(int(want.size), 1)
    return int(np.sum(~((got == want) | ((got != got) & (want != want)))))


def _load(path: str | Path) -> ModelProto:
    try:
        model: ModelProto = onnx.load(path)
    except Exception as error:  # protobuf, onnx and the operating system each raise their own
        raise _unusable(path, error) from None
    return model


def _with_every_value(model: ModelProto, program: Program, path: str | Path) -> ModelProto:
    """``model`` with every value that an op of ``program`` writes as an output."""
    graph = model.graph
    inner, known = {info.name for info in graph.value_info}, {info.name for info in (*graph.input, *graph.output)}
    missing = sorted(set(program.values) - inner - known)
    if missing:
        raise ProgramError("QAT224", str(path), f"has no tensor {missing[0]!r}", "Export this Program again")
    opened = ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend(info for info in graph.value_info if info.name in program.values)
    return opened


def _run(model: ModelProto, feeds: dict[str, Array], level: Any, path: str | Path) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    names = [info.name for info in model.graph.output]
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:  # ONNX Runtime's own classes share no other base
        raise _unusable(path, error) from None


def _unusable(path: str | Path, error: Exception) -> ProgramError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return ProgramError("QAT224", str(path), f"cannot be run by ONNX Runtime ({first})", "Export the Program again")
