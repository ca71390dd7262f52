"""Multiplication, and division as multiplication by a reciprocal."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qatlib.factors import lone_factor
from qatlib.integer import Requantizer
from qatlib.ops.base import Attrs, Call, Format, Kernel, Params, Range, Ref, Traced
from qatlib.ops.clamp import apply_clamp, export_clamp
from qatlib.ops.elementwise import (
    Elementwise,
    aligned,
    constants,
    export_reals,
    export_saturated,
    number,
    operand,
    promoted,
    saturated,
    whole,
)
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering

_RECIPROCAL = Format("int16")


def product(call: Call, a: Any, b: Any) -> Any:
    """``a * b`` as one node. Multiplying by the number 1 adds no node; of truth values it is ``and``."""
    content = promoted(a, b)
    for x, other in ((a, b), (b, a)):
        if isinstance(x, Ref) and x.content == content and number(other) == 1:
            return x
    inputs = operand(call, a, content), operand(call, b, content)
    return Traced(inputs, {"function": "and"}, op="logical") if content == "bool" else Traced(inputs, op="mul")


def quotient(call: Call, a: Any, b: Any) -> Any:
    """``a / b``: by a constant, the product with its reciprocal; by an activation, steps ``.reciprocal``, ``.mul``."""
    if not isinstance(b, Ref):
        divisor = number(b)
        if divisor == 0:
            raise call.refuse("a division by 0", "Divide by another number")
        if divisor is not None:
            return product(call, a, 1 / divisor if divisor != 1 else 1.0)
        if not isinstance(b, Tensor):
            raise call.refuse(f"a division by a {type(b).__name__}", "Use tensors and real numbers")
        if not bool((b != 0).all()):
            raise call.refuse("a division by a constant that holds 0", "Keep 0 out of the divisor")
        return product(call, a, call.derive(b, "reciprocal", lambda t: 1 / t.float()))
    numerator = number(a)
    attrs = {"function": "reciprocal", "numerator": 1.0 if numerator is None else float(numerator)}
    inputs = (operand(call, b, "float"),)
    if numerator is not None:
        return Traced(inputs, attrs, op="unary")
    inverse = call.emit("unary", inputs, attrs, suffix=".reciprocal", format=_RECIPROCAL)
    return call.emit("mul", [operand(call, a, "float"), inverse], suffix=".mul")


class Mul(Elementwise):
    name = "mul"
    operation = "mul"
    takes_clamp = True
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.mul, torch.multiply, operator.mul, operator.imul)
    methods: ClassVar[tuple[str, ...]] = ("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__")

    def trace(self, call: Call) -> Any:
        found = call.bind("input", "other")
        return product(call, found.get("input"), found.get("other"))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return apply_clamp(inputs[0] * inputs[1], attrs.get("clamp"))

    def lower(self, low: Lowering) -> None:
        lo, hi = low.output_clamp()
        multiplier, shift = 1, 0
        if low.out.scale is not None:
            r = low.input_scale(0) * low.input_scale(1) / low.output_scale
            multiplier, shift = lone_factor(r, low.bits, low.name)
        low.emit("mul", {"lo": lo, "hi": hi}, constants([multiplier], [shift]))

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        lo, hi = super().out_range(op, value, ranges)
        return (min(max(lo, 0), hi), hi) if len(set(op.inputs)) == 1 else (lo, hi)  # a square is not negative

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        if whole(op, program):
            return lambda a, b: saturated(a.long() * b.long())
        multiplier, shift = program.constant(op, "multiplier"), program.constant(op, "shift")
        first, second = (max(-lo, hi) for lo, hi in ranges)
        requantize = Requantizer.plan([multiplier], shift, [first * second], op.attrs["lo"], op.attrs["hi"])
        axes = len(program.values[op.output].shape)
        return lambda a, b: requantize.product(aligned(a, axes), aligned(b, axes))

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        carrier = "int64" if whole(op, program) else "float64"
        acc = graph.node("Mul", *(graph.read(name, carrier) for name in op.inputs))
        if whole(op, program):
            graph.write(op.output, export_saturated(graph, acc))
            return
        multiplier, shift = (program.constant(op, role).numpy() for role in ("multiplier", "shift"))
        graph.write(op.output, graph.requantize([(acc, multiplier)], shift, op.attrs["lo"], op.attrs["hi"]))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return export_clamp(graph, graph.node("Mul", *export_reals(graph, inputs, attrs)), attrs.get("clamp"))


class Div(Mul):
    """Division; it becomes ``mul`` and the table of the reciprocal."""

    name = "div"
    functions = (torch.div, torch.divide, torch.true_divide, operator.truediv, operator.itruediv)
    methods = ("div", "div_", "divide", "divide_", "true_divide", "true_divide_", "__truediv__", "__rtruediv__")

    def trace(self, call: Call) -> Any:
        found = call.bind("input", "other", rounding_mode=None)
        a, b = found.get("input"), found.get("other")
        if found["rounding_mode"] is not None:
            raise call.refuse(f"rounding_mode {found['rounding_mode']!r}", "Divide without rounding")
        return quotient(call, b, a) if call.function == "__rtruediv__" else quotient(call, a, b)


class FloorDiv(Mul):
    """Floor division and remainders: their steps are lost in the rounding of any scale, so they are refused."""

    name = "floor_divide"
    functions = (torch.floor_divide, operator.floordiv, torch.remainder, torch.fmod, operator.mod)
    methods = ("floor_divide", "floor_divide_", "remainder", "remainder_", "fmod", "fmod_")

    def trace(self, call: Call) -> Any:
        raise call.refuse("a floor division or remainder of tensors", "Run it after the outputs")
