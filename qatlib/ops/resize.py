"""Interpolation on a regular grid: nearest neighbours move codes, linear and cubic ones weigh them by integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.integer import EXACT_FLOAT32
from qatlib.ops.base import Attrs, Call, Cost, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.region import Box, Need, Part, Regions, drawn, image_axes
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering

_LINEAR = ("linear", "bilinear", "trilinear", "bicubic")


def coefficient_bits(dtype: str, axes: int) -> int:
    """Fraction bits k of the coefficients: 11 for int8; for int16 up to 16, so that sums over all axes stay exact.

    A coefficient is off by at most 2^-(k+1), so an axis with t taps adds at most t * max|code| * 2^-(k+1) codes.
    """
    return 11 if dtype == "int8" else min(16, 36 // axes)


def coefficients(weights: Sequence[Sequence[float]], bits: int) -> Tensor:
    """``[out, in]`` integers whose rows sum to exactly 2^bits: each rounded half to even, and what then lacks is added
    to the row's largest coefficient (the first of equal ones).
    """
    real = np.asarray(weights, dtype=np.float64)
    codes = np.rint(real * 2.0**bits).astype(np.int64)
    lacks = 2**bits - codes.sum(axis=1)
    codes[np.arange(len(codes)), real.argmax(axis=1)] += lacks
    return torch.from_numpy(codes.astype(np.int32))


class ResizeNearest(Operator):
    """Nearest neighbours; ``index`` holds per spatial axis the input position of every output position."""

    name = "resize_nearest"
    form = "resize"
    modules = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
    functions = (F.interpolate, F.upsample, F.upsample_nearest, F.upsample_bilinear)
    keeps_scale = True

    def trace(self, call: Call) -> Traced:
        found = _settings(call)
        x, mode = found["input"], found["mode"]
        if not isinstance(x, Ref):
            raise call.refuse("interpolation of a constant", "Compute the constant once, in __init__")
        if found.get("antialias"):
            raise call.refuse("interpolation with antialias=True", "Use antialias=False")
        if mode not in ("nearest", "nearest-exact", *_LINEAR):
            raise call.refuse(f"interpolation mode {mode!r}", "Use nearest, nearest-exact, linear or cubic ones")
        axes = range(2, len(x.shape))
        matrices = [_matrix(x.shape[axis], call.out_shape[axis], found, axis - 2) for axis in axes]
        if mode in _LINEAR:
            return Traced((x,), {"weights": [m.tolist() for m in matrices]}, op="resize_linear")
        return Traced((x,), {"index": [m.argmax(1).tolist() for m in matrices]})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        for axis, index in enumerate(attrs["index"], start=2):
            x = x.index_select(axis, torch.tensor(index, device=x.device))
        return x

    def lower(self, low: Lowering) -> None:
        index = {f"index{i}": torch.tensor(row, dtype=torch.int32) for i, row in enumerate(low.attrs["index"])}
        low.emit(self.name, {}, index)

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        rows = [program.constant(op, f"index{i}").long() for i in range(len(op.consts))]

        def run(x: Tensor) -> Tensor:
            for axis, row in enumerate(rows, start=2):
                x = x.index_select(axis, row)
            return x

        return run

    def regions(self, op: Op, program: Program) -> Regions:
        rows = [program.constant(op, f"index{i}") for i in range(len(op.consts))]

        def part(box: Box) -> Part:
            taken = [row[slice(*span)] for row, span in zip(rows, box[2:], strict=True)]
            reads = [drawn(row.tolist()) for row in taken]

            def consts() -> dict[str, Tensor]:
                return {f"index{i}": row - low for i, (row, (low, _)) in enumerate(zip(taken, reads, strict=True))}

            return Part((Need((*box[:2], *reads)),), {}, consts, box[2:])

        return Regions(image_axes(program.values[op.output]), part)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        x, last = op.inputs[0], len(op.consts) - 1
        for axis in range(last + 1):
            index = graph.constant(program.constant(op, f"index{axis}").numpy().astype(np.int64))
            x = graph.node("Gather", x, index, axis=axis + 2, output=op.output if axis == last else None)

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        return {"index": [program.constant(op, f"index{i}").tolist() for i in range(len(op.consts))]}, {}

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        x = inputs[0]
        for axis, index in enumerate(attrs["index"], start=2):
            x = graph.node("Gather", x, graph.constant(np.array(index, np.int64)), axis=axis)
        return x


class ResizeLinear(Operator):
    """Linear and cubic interpolation, axis by axis; ``weights`` holds one matrix ``[out, in]`` per spatial axis."""

    name = "resize_linear"
    form = "resize"
    keeps_scale = True

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        for axis, weights in enumerate(attrs["weights"], start=2):
            x = _along(x, torch.tensor(weights, dtype=x.dtype, device=x.device), axis)
        return x

    def rounds(self, attrs: Attrs) -> bool:
        return True

    def lower(self, low: Lowering) -> None:
        matrices = low.attrs["weights"]
        bits = coefficient_bits(low.out.dtype, len(matrices))
        consts = {f"weight{i}": coefficients(matrix, bits) for i, matrix in enumerate(matrices)}
        low.emit(self.name, {"bits": bits, "lo": low.out.limits[0], "hi": low.out.limits[1]}, consts)

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        return value.qtype.limits

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        matrices = [program.constant(op, f"weight{i}") for i in range(len(op.consts))]
        bound = max(-ranges[0][0], ranges[0][1])
        for matrix in matrices:
            bound *= int(matrix.abs().sum(1).max())
        carrier = torch.float32 if bound < EXACT_FLOAT32 else torch.float64
        matrices = [matrix.to(carrier) for matrix in matrices]
        unit, lo, hi = 2.0 ** (-op.attrs["bits"] * len(matrices)), op.attrs["lo"], op.attrs["hi"]

        def run(x: Tensor) -> Tensor:
            x = x.to(carrier)
            for axis, matrix in enumerate(matrices, start=2):
                x = _along(x, matrix, axis)
            return x.mul(unit).round_().clamp_(lo, hi).float()

        return run

    def regions(self, op: Op, program: Program) -> Regions:
        matrices = [program.constant(op, f"weight{i}") for i in range(len(op.consts))]

        def part(box: Box) -> Part:
            taken = [matrix[slice(*span)] for matrix, span in zip(matrices, box[2:], strict=True)]
            reads = [drawn(matrix.any(0).nonzero().flatten().tolist()) for matrix in taken]

            def consts() -> dict[str, Tensor]:
                return {f"weight{i}": m[:, slice(*span)] for i, (m, span) in enumerate(zip(taken, reads, strict=True))}

            return Part((Need((*box[:2], *reads)),), {}, consts, box[2:])

        return Regions(image_axes(program.values[op.output]), part)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        matrices = [program.constant(op, f"weight{i}").numpy().astype(np.float64) for i in range(len(op.consts))]
        total = _onnx_along(graph, graph.read(op.inputs[0], "float64"), matrices)
        unit = graph.constant(np.float64(2.0 ** (-op.attrs["bits"] * len(matrices))))
        rounded = graph.node("Round", graph.node("Mul", total, unit))
        graph.write(op.output, graph.clip(rounded, op.attrs["lo"], op.attrs["hi"]))

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        unit = 2.0 ** -op.attrs["bits"]
        return {"weights": [(program.constant(op, f"weight{i}") * unit).tolist() for i in range(len(op.consts))]}, {}

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return _onnx_along(graph, inputs[0], [np.array(matrix, np.float32) for matrix in attrs["weights"]])

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        taps = 1
        for i in range(len(op.consts)):
            taps *= int((program.constant(op, f"weight{i}") != 0).sum(1).max())
        return Cost(0, base.vector_ops * taps, base.weight_bytes, base.input_bytes, base.output_bytes)


def _along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """``matrix [out, in]`` applied along one axis of ``x``."""
    return torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)


def _onnx_along(graph: Graph, x: str, matrices: Sequence[Any]) -> str:
    """Matrices ``[out, in]`` applied to the spatial axes of ``x`` one after the other."""
    rank = len(matrices) + 2
    for axis, matrix in enumerate(matrices, start=2):
        swap = list(range(rank))
        swap[axis], swap[-1] = swap[-1], swap[axis]
        x = x if axis == rank - 1 else graph.node("Transpose", x, perm=swap)
        x = graph.node("MatMul", x, graph.constant(matrix.T))
        x = x if axis == rank - 1 else graph.node("Transpose", x, perm=swap)
    return x


def _settings(call: Call) -> dict[str, Any]:
    found = call.bind("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias",
                      size=None, scale_factor=None, mode="nearest", align_corners=None,
                      recompute_scale_factor=None)  # fmt: skip
    if call.module is not None:
        names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
        found |= {name: getattr(call.module, name, None) for name in names}
    if call.function in (F.upsample_nearest, F.upsample_bilinear):
        found |= {"mode": "bilinear", "align_corners": True} if call.function is F.upsample_bilinear else {}
    if isinstance(found["size"], Ref | Tensor) or isinstance(found["scale_factor"], Ref | Tensor):
        raise call.refuse("interpolation to a size that depends on values", "Use numbers")
    return found


def _matrix(size: int, out: int, found: dict[str, Any], axis: int) -> Tensor:
    """Weights ``[out, size]`` of one axis: what torch makes of every unit vector, in float64."""
    mode = found["mode"]
    factor = found["scale_factor"]
    factor = factor[axis] if isinstance(factor, list | tuple) else factor
    target: dict[str, Any] = {"size": (out, 1)}
    if factor is not None and not found.get("recompute_scale_factor"):
        target = {"scale_factor": (float(factor), 1.0)}
    flat = {"linear": "bilinear", "trilinear": "bilinear"}.get(mode, mode)
    corners = {"align_corners": bool(found["align_corners"])} if mode in _LINEAR else {}
    units = torch.eye(size, dtype=torch.float64).view(1, size, size, 1)
    return F.interpolate(units, mode=flat, **target, **corners)[0, :, :, 0].T
