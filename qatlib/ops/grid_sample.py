"""Sampling an image at given positions: ``grid_sample``, ``affine_grid`` and ``warp``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qatlib.errors import ProgramError, QConfigError
from qatlib.factors import factor
from qatlib.integer import EXACT_FLOAT32, power_of_two
from qatlib.ops.base import Attrs, Call, Cost, Format, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.region import Need, Part, Regions, image_axes, whole, without
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering

FRACTION_BITS = 10
"""Fraction bits of a position in pixels."""


def get_grid_quant_scale(grid_shape: Sequence[int], view_shape: Sequence[int]) -> float:
    """int16 scale for a grid of displacements or positions in pixels, to be given to a ``QuantStub`` before ``warp``.

    ``grid_shape`` and ``view_shape`` are (height, width) of the output and of the image that is sampled. The scale is
    2^-f, where f is the number of bits that int16 has left beside positions up to the longest side, at most 8.
    """
    longest = max(*grid_shape, *view_shape)
    return 2.0 ** -max(0, min(8, 15 - math.ceil(math.log2(longest + 1))))


def warp(x: Any, grid: Any, mode: str = "bilinear", padding_mode: str = "zeros") -> Any:
    """``x`` ``[N, C, H, W]`` sampled at every output position plus a displacement in pixels.

    ``grid`` is ``[N, Ho, Wo, 2]``: output (i, j) is ``x`` at column ``j + grid[..., 0]`` and row ``i + grid[..., 1]``.
    """
    for argument in (x, grid):
        if isinstance(argument, fx.Proxy):
            return argument.tracer.create_proxy("call_function", warp, (x, grid, mode, padding_mode), {})
    height, width = grid.shape[1:3]
    rows = torch.arange(height, dtype=grid.dtype, device=grid.device).view(1, -1, 1)
    columns = torch.arange(width, dtype=grid.dtype, device=grid.device).view(1, 1, -1)
    return _sample(x, columns + grid[..., 0], rows + grid[..., 1], mode, padding_mode)


def _sample(x: Tensor, column: Tensor, row: Tensor, mode: str, padding_mode: str) -> Tensor:
    """``x`` at positions in pixels, each ``[N, Ho, Wo]``."""
    height, width = x.shape[2:]
    normalized = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], -1)
    return F.grid_sample(x, normalized, mode, padding_mode, align_corners=False)


class GridSample(Operator):
    """Attributes: ``mode``, ``padding_mode``, ``unit``: "pixels" for displacements, else "corners" or "edges", which is
    what -1 and 1 of a normalized grid stand for.
    """

    name = "grid_sample"
    form = "warp"
    functions = (F.grid_sample, torch.grid_sampler, warp)
    keeps_scale = True

    def trace(self, call: Call) -> Traced:
        if call.function is torch.grid_sampler:
            found = call.bind("input", "grid", "mode", "padding_mode", "align_corners")
            found["mode"] = ("bilinear", "nearest", "bicubic")[found["mode"]]
            found["padding_mode"] = ("zeros", "border", "reflection")[found["padding_mode"]]
        else:
            x_name = "x" if call.function is warp else "input"
            found = call.bind(x_name, "grid", "mode", "padding_mode", "align_corners",
                              mode="bilinear", padding_mode="zeros", align_corners=False)  # fmt: skip
            found["input"] = found[x_name]
        x = found["input"]
        if not isinstance(x, Ref):
            raise call.refuse("samples a constant image", "Sample an activation")
        if len(x.shape) != 4:
            raise call.refuse("samples a volume", "Use images [N, C, H, W]")
        if found["mode"] not in ("bilinear", "nearest"):
            raise call.refuse(f"mode {found['mode']!r}", "Use bilinear or nearest")
        if found["padding_mode"] not in ("zeros", "border"):
            raise call.refuse(f"padding_mode {found['padding_mode']!r}", "Use zeros or border")
        unit = "pixels" if call.function is warp else "corners" if found["align_corners"] else "edges"
        attrs = {"mode": found["mode"], "padding_mode": found["padding_mode"], "unit": unit}
        return Traced((x, call.ref(found["grid"])), attrs)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        x, grid = inputs
        grid = grid.expand(x.shape[0], -1, -1, -1)
        if attrs["unit"] == "pixels":
            out: Tensor = warp(x, grid, attrs["mode"], attrs["padding_mode"])
            return out
        return F.grid_sample(x, grid, attrs["mode"], attrs["padding_mode"], attrs["unit"] == "corners")

    def check_formats(self, node: str, inputs: Sequence[str], output: str) -> None:
        if inputs[1] != "int16":
            raise QConfigError(
                "QAT148",
                node,
                f"its grid is {inputs[1]}, which has too few codes for positions in an image",
                "Give the grid activation: int16 in qconfig (of the input or the operator that makes it)",
            )

    def rounds(self, attrs: Attrs) -> bool:
        return True

    def lower(self, low: Lowering) -> None:
        unit = low.attrs["unit"]
        sizes = (low.inputs[0].shape[3], low.inputs[0].shape[2])
        halves = [1.0 if unit == "pixels" else (size - (unit == "corners")) / 2 for size in sizes]
        ratios = [low.input_scale(1) * half * 2**FRACTION_BITS for half in halves]
        solved = [factor(ratio, low.bits, low.name) if ratio else (0, 0) for ratio in ratios]
        low.emit(
            self.name,
            {**low.attrs, "bits": FRACTION_BITS},
            {
                "multiplier": torch.tensor([m for m, _ in solved], dtype=torch.int32),
                "shift": torch.tensor([n for _, n in solved], dtype=torch.int32),
            },
        )

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        low, high = ranges[0]
        return (min(low, 0), max(high, 0)) if op.attrs["padding_mode"] == "zeros" else (low, high)

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        height, width = program.in_values(op)[0].shape[2:]
        power = power_of_two(-program.constant(op, "shift"))
        scaled = (program.constant(op, "multiplier").double() * power).tolist()
        bits, unit, border = op.attrs["bits"], op.attrs["unit"], op.attrs["padding_mode"] == "border"
        bilinear = op.attrs["mode"] == "bilinear"
        one = 2**bits
        bound = max(-ranges[0][0], ranges[0][1]) * one * one
        carrier = torch.float32 if bound < EXACT_FLOAT32 else torch.float64

        def positions(grid: Tensor, k: int, size: int) -> Tensor:
            """Of every output, in units of 2^-bits pixels, int64 ``[N, Ho, Wo]``."""
            moved: Tensor = (grid[..., k].double() * scaled[k]).round_().long()
            if unit == "pixels":
                start = torch.arange(grid.shape[2 - k], device=grid.device) * one
                moved = moved + (start if k == 0 else start.unsqueeze(1))
            else:
                moved = moved + (size - 1) * (one // 2)
            return moved.clamp(0, (size - 1) * one) if border else moved

        def run(x: Tensor, grid: Tensor) -> Tensor:
            column, row = positions(grid, 0, width), positions(grid, 1, height)
            flat = x.flatten(2).to(carrier)
            channels = x.shape[1]

            def at(i: Tensor, j: Tensor) -> Tensor:
                """``x`` at row i and column j, 0 outside, ``[N, C, Ho, Wo]``."""
                inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
                index = (i.clamp(0, height - 1) * width + j.clamp(0, width - 1)).flatten(1)
                index = index.unsqueeze(1).expand(x.shape[0], channels, -1)
                taken = flat.gather(2, index).view(*flat.shape[:2], *i.shape[1:])
                return taken * inside.unsqueeze(1)

            if not bilinear:
                return at(*((p.double() / one).round_().long() for p in (row, column))).float()
            i, j = row.div(one, rounding_mode="floor"), column.div(one, rounding_mode="floor")
            down, right = ((p - q * one).to(carrier).unsqueeze(1) for p, q in ((row, i), (column, j)))
            upper = at(i, j) * (one - right) + at(i, j + 1) * right
            lower = at(i + 1, j) * (one - right) + at(i + 1, j + 1) * right
            total: Tensor = upper * (one - down) + lower * down
            return total.mul_(1.0 / (one * one)).round_().float()

        return run

    def regions(self, op: Op, program: Program) -> Regions:
        """Any place of the image may be read; a grid in pixels is relative to where it is in the map."""
        out, (x, grid) = program.values[op.output], program.in_values(op)
        axes, image, last = image_axes(out), whole(x.sizes()[2:]), (0, grid.shape[-1])
        if op.attrs["unit"] == "pixels":
            axes = without(axes, (2, 3))
        return Regions(axes, lambda box: Part((Need((*box[:2], *image)), Need((box[0], *box[2:], last)))))

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        x, (height, width) = op.inputs[0], program.in_values(op)[0].shape[2:]
        channels, bits = program.in_values(op)[0].shape[1], op.attrs["bits"]
        one = 2**bits
        grid = graph.read(op.inputs[1], "float64")
        rows, columns = program.values[op.output].shape[2:]
        factors = program.constant(op, "multiplier").numpy() * np.ldexp(1.0, -program.constant(op, "shift").numpy())
        starts = (np.arange(columns)[None, :] * one, np.arange(rows)[:, None] * one)
        positions = []
        for k, size in enumerate((width, height)):
            coordinate = graph.node("Gather", grid, graph.constant(np.array(k, np.int64)), axis=3)
            moved = graph.node("Round", graph.node("Mul", coordinate, graph.constant(np.float64(factors[k]))))
            offset = starts[k] if op.attrs["unit"] == "pixels" else np.array((size - 1) * (one // 2))
            p = graph.node("Add", moved, graph.constant(offset.astype(np.float64)))
            positions.append(graph.clip(p, 0, (size - 1) * one) if op.attrs["padding_mode"] == "border" else p)
        flat = graph.reshape(graph.read(x, "float64"), [-1, channels, height * width])

        def float64(number: float) -> str:
            return graph.constant(np.float64(number))

        def at(row: str, column: str) -> str:
            """``x`` at whole positions, float64 ``[N, Ho, Wo]``, as ``[N, C, Ho * Wo]``; 0 outside."""
            r, c = graph.clip(row, 0, height - 1), graph.clip(column, 0, width - 1)
            inside = graph.node("And", graph.node("Equal", r, row), graph.node("Equal", c, column))
            index = graph.cast(graph.node("Add", graph.node("Mul", r, float64(width)), c), "int64")
            index = graph.node("Expand", graph.reshape(index, [-1, 1, rows * columns]),
                               graph.constant(np.array([1, channels, 1])))  # fmt: skip
            mask = graph.reshape(graph.cast(inside, "float64"), [-1, 1, rows * columns])
            return graph.node("Mul", graph.node("GatherElements", flat, index, axis=2), mask)

        if op.attrs["mode"] == "nearest":
            column, row = (graph.node("Round", graph.node("Mul", p, float64(1 / one))) for p in positions)
            total = at(row, column)
        else:
            (j, right), (i, down) = (_whole_and_fraction(graph, p, one, rows * columns) for p in positions)
            left, up = (graph.node("Sub", float64(one), part) for part in (right, down))
            lines = []
            for row in (i, graph.node("Add", i, float64(1))):
                first = graph.node("Mul", at(row, j), left)
                second = graph.node("Mul", at(row, graph.node("Add", j, float64(1))), right)
                lines.append(graph.node("Add", first, second))
            total = graph.node("Add", graph.node("Mul", lines[0], up), graph.node("Mul", lines[1], down))
            total = graph.node("Round", graph.node("Mul", total, float64(1 / one**2)))
        graph.write(op.output, graph.reshape(total, [-1, channels, rows, columns]))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        if attrs["unit"] == "pixels":
            raise ProgramError("QAT220", graph.scope, "warp has no float ONNX form", "Use F.grid_sample")
        corners = int(attrs["unit"] == "corners")
        mode = "linear" if attrs["mode"] == "bilinear" else "nearest"
        return graph.node("GridSample", *inputs, mode=mode, padding_mode=attrs["padding_mode"], align_corners=corners)

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        taps = 4 if op.attrs["mode"] == "bilinear" else 1
        return Cost(0, base.vector_ops * taps, base.weight_bytes, base.input_bytes, base.output_bytes)


def _whole_and_fraction(graph: IntegerGraph, p: str, one: int, outputs: int) -> tuple[str, str]:
    """Of positions in units of 1 / one: the whole part ``[N, Ho, Wo]`` and the rest ``[N, 1, Ho * Wo]``, float64."""
    whole = graph.node("Floor", graph.node("Mul", p, graph.constant(np.float64(1 / one))))
    rest = graph.node("Sub", p, graph.node("Mul", whole, graph.constant(np.float64(one))))
    return whole, graph.reshape(rest, [-1, 1, outputs])


class AffineGrid(Operator):
    """``F.affine_grid``: a constant grid ``[H * W, 3]`` times theta, in steps .permute .matmul .reshape."""

    name = "affine_grid"
    functions = (F.affine_grid, torch.affine_grid_generator)

    def trace(self, call: Call) -> Any:
        found = call.bind("theta", "size", "align_corners", align_corners=False)
        theta = found["theta"]
        if not isinstance(theta, Ref) or len(call.out_shape) != 4:
            raise call.refuse("affine_grid of a constant or in 3-d", "Use theta [N, 2, 3] computed by the model")
        height, width = call.out_shape[1:3]
        identity = torch.eye(2, 3).unsqueeze(0)
        base = F.affine_grid(identity, [1, 1, height, width], bool(found["align_corners"])).view(height * width, 2)
        base = torch.cat([base, torch.ones(len(base), 1)], 1)
        across = call.emit("permute", [theta], {"dims": [0, 2, 1]}, suffix=".permute")
        fine = Format("int16")
        grid = call.emit("matmul", [call.ref(base), across], suffix=".matmul", format=fine)
        return call.emit("reshape", [grid], {"shape": [-1, height, width, 2]}, suffix=".reshape")

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        raise NotImplementedError("affine_grid is traced into its steps")
