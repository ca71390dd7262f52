"""Concatenation: every input is brought to the scale of the output. Stack is a concatenation along a new axis."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatlib.factors import factor
from qatlib.integer import Requantizer
from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.composite import Composite
from qatlib.ops.region import Box, Need, Part, Regions, image_axes
from qatlib.ops.shape import expand_to, reshape_to
from qatlib.ops.work import Work
from qatlib.program import Op, Program, Value
from qatlib.qtype import limits

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering


def _operands(call: Call) -> list[Ref]:
    """What is joined; constants become nodes."""
    tensors = call.args[0] if call.args else call.kwargs.get("tensors")
    if not isinstance(tensors, list | tuple) or not all(isinstance(t, Ref | Tensor) for t in tensors):
        raise call.refuse("joins something else than a list of tensors", "Pass a list or tuple of tensors")
    refs = [call.ref(tensor) for tensor in tensors]
    if len({ref.content for ref in refs}) > 1:
        raise call.refuse("joins real numbers with integers or truth values", "Convert them to one dtype first")
    return refs


def _aligned(call: Call, refs: Sequence[Ref], axis: int) -> tuple[Ref, ...]:
    """Constants without the batch are repeated to it, as a class token is."""
    if any(ref.shape[axis] < 0 for ref in refs):
        raise call.refuse("joins along the batch axis", "Join along another axis")
    like = next(ref for ref in refs if any(size < 0 for size in ref.shape))
    aligned = []
    for ref in refs:
        shape = [*like.shape]
        shape[axis] = ref.shape[axis]
        repeated = expand_to(call, ref, shape, like)
        assert isinstance(repeated, Ref)
        aligned.append(repeated)
    return tuple(aligned)


class Cat(Operator):
    name = "cat"
    form = "copy"
    functions = (torch.cat, torch.concat, torch.concatenate)

    def trace(self, call: Call) -> Traced:
        found = call.bind("tensors", "dim", dim=0)
        refs = _operands(call)
        axis = int(call.kwargs.get("axis", found["dim"])) % len(refs[0].shape)
        return Traced(_aligned(call, refs, axis), {"axis": axis})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, attrs["axis"])

    def lower(self, low: Lowering) -> None:
        if low.node.content != "float":
            low.emit(self.name, {"axis": low.attrs["axis"]})
            return
        solved = [factor(low.input_scale(i) / low.output_scale, low.bits, low.name) for i in range(len(low.inputs))]
        lo, hi = low.output_clamp()
        low.emit(
            self.name,
            {"axis": low.attrs["axis"], "lo": lo, "hi": hi},
            {
                "multiplier": torch.tensor([m for m, _ in solved], dtype=torch.int32),
                "shift": torch.tensor([n for _, n in solved], dtype=torch.int32),
            },
        )

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        if "lo" in op.attrs:
            return op.attrs["lo"], op.attrs["hi"]
        return min(lo for lo, _ in ranges), max(hi for _, hi in ranges)

    def work(self, op: Op, program: Program) -> Work:
        values = [program.values[op.output], *program.in_values(op)]
        same = len({value.qtype.dtype for value in values}) == 1
        if same and "lo" in op.attrs:  # 1 is 2^n / 2^n
            lowest, highest = limits(values[0].qtype.dtype)
            units = program.constant(op, "multiplier").long() == 1 << program.constant(op, "shift").long()
            same = bool(units.all()) and op.attrs["lo"] <= lowest and op.attrs["hi"] >= highest
        return replace(super().work(op, program), joins=same)

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        axis = op.attrs["axis"]
        if "lo" not in op.attrs:
            return lambda *xs: torch.cat(xs, axis)
        multipliers, shifts = program.constant(op, "multiplier"), program.constant(op, "shift")
        steps = [
            Requantizer.plan(
                [multipliers[i : i + 1]], shifts[i : i + 1], [max(-lo, hi)], op.attrs["lo"], op.attrs["hi"]
            )
            for i, (lo, hi) in enumerate(ranges)
        ]
        return lambda *xs: torch.cat([step(x) for step, x in zip(steps, xs, strict=True)], axis)

    def regions(self, op: Op, program: Program) -> Regions:
        axis, values = op.attrs["axis"], program.in_values(op)
        ends = list(itertools.accumulate(value.shape[axis] for value in values))

        def part(box: Box) -> Part:
            start, stop = box[axis]
            needs: list[Need | None] = []
            for value, end in zip(values, ends, strict=True):
                first = end - value.shape[axis]
                span = max(start, first) - first, min(stop, end) - first
                needs.append(Need((*box[:axis], span, *box[axis + 1 :])) if span[0] < span[1] else None)
            read = [i for i, need in enumerate(needs) if need is not None]

            def consts() -> dict[str, Tensor]:
                return {role: program.constant(op, role)[read] for role in op.consts}

            return Part(tuple(needs), {}, consts, tuple(read))

        return Regions(image_axes(program.values[op.output]), part)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        if "lo" not in op.attrs:
            graph.move(op, "Concat", axis=op.attrs["axis"])
            return
        multipliers, shifts = (program.constant(op, role).numpy() for role in ("multiplier", "shift"))
        parts = [
            graph.requantize([(graph.read(name, "float64"), m)], n, op.attrs["lo"], op.attrs["hi"])
            for name, m, n in zip(op.inputs, multipliers, shifts, strict=True)
        ]
        graph.write(op.output, graph.node("Concat", *parts, axis=op.attrs["axis"]))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node("Concat", *inputs, axis=attrs["axis"])


class Stack(Composite):
    """stack: a ``.reshape`` per input, then ``.cat``. hstack, vstack and column_stack: ``.cat``."""

    name = "stack"
    functions = (torch.stack, torch.hstack, torch.vstack, torch.row_stack, torch.column_stack)

    def trace(self, call: Call) -> Any:
        refs = _operands(call)
        axes = len(refs[0].shape)
        if call.function is torch.stack:
            dim = int(call.bind("tensors", "dim", dim=0)["dim"]) % (axes + 1)
            refs = [self._with_axis(call, ref, dim) for ref in refs]
        elif axes < 2:
            raise call.refuse("stacks tensors of one axis", "Use torch.stack")
        else:
            dim = 0 if call.function in (torch.vstack, torch.row_stack) else 1
        return call.emit("cat", _aligned(call, refs, dim), {"axis": dim}, suffix=".cat")

    @staticmethod
    def _with_axis(call: Call, ref: Ref, dim: int) -> Ref:
        op, attrs = reshape_to([*ref.shape[:dim], 1, *ref.shape[dim:]])
        return call.emit(op, [ref], attrs, suffix=f".{op}")
