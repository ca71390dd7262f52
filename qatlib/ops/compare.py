"""Comparisons, which make truth values, and logic on truth values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.elementwise import aligned, content_of, export_reals, export_truth, number, reads_integers
from qatlib.ops.region import Regions, pointwise
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering

_RELATIONS = {
    "gt": ("gt", "greater"),
    "ge": ("ge", "greater_equal"),
    "lt": ("lt", "less"),
    "le": ("le", "less_equal"),
    "eq": ("eq",),
    "ne": ("ne", "not_equal"),
}
_ONNX = {"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal", "ne": "Equal"}
_RELATION_OF: dict[Any, str] = {
    target: relation
    for relation, names in _RELATIONS.items()
    for target in (*(getattr(torch, n) for n in names), *names, f"__{relation}__", getattr(operator, relation))
}
MAX_EXPONENT = 64
"""Larger than any product of code and mantissa has bits, so a larger exponent changes no comparison."""


def mantissa_of(scale: float) -> tuple[int, int]:
    """``(m, k)`` with m odd and ``scale == m * 2^k``; m is below 2^24 for a float32."""
    numerator, denominator = scale.as_integer_ratio()
    trailing = (numerator & -numerator).bit_length() - 1
    return numerator >> trailing, trailing - (denominator.bit_length() - 1)


class Compare(Operator):
    """``a function b`` with the attribute ``function`` one of gt, ge, lt, le, eq, ne."""

    name = "compare"
    functions = tuple(target for target in _RELATION_OF if not isinstance(target, str))
    methods = tuple(target for target in _RELATION_OF if isinstance(target, str))

    def trace(self, call: Call) -> Any:
        found = call.bind("input", "other")
        a, b = found.get("input"), found.get("other")
        return Traced((_compared(call, a, b), _compared(call, b, a)), {"function": _RELATION_OF[call.function]})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        compare: Callable[..., Tensor] = getattr(torch, attrs["function"])
        return compare(*inputs)

    def lower(self, low: Lowering) -> None:
        pairs = [mantissa_of(1.0 if value.qtype.scale is None else value.qtype.scale) for value in low.inputs]
        lowest = min(k for _, k in pairs)
        consts = {
            "mantissa": torch.tensor([m for m, _ in pairs], dtype=torch.int32),
            "exponent": torch.tensor([min(MAX_EXPONENT, k - lowest) for _, k in pairs], dtype=torch.int32),
        }
        low.emit("compare", {"function": low.attrs["function"]}, consts)

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        return 0, 1

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        """In float64: a code has at most 16 bits and a mantissa 24, or 32 and 1, so the products are exact."""
        units = [_unit(op, program, i) for i in (0, 1)]
        compare: Callable[..., Tensor] = getattr(torch, op.attrs["function"])
        if units[0] == units[1]:
            return lambda a, b: compare(a, b).float()
        return lambda a, b: compare(a.double() * units[0], b.double() * units[1]).float()

    def regions(self, op: Op, program: Program) -> Regions:
        return pointwise(op, program)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        sides = []
        for i, name in enumerate(op.inputs):
            unit = graph.constant(np.float64(_unit(op, program, i)))
            sides.append(graph.node("Mul", graph.read(name, "float64"), unit))
        graph.write(op.output, self._onnx(graph, op.attrs["function"], *sides))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        sides = export_reals(graph, inputs, attrs)
        return graph.cast(self._onnx(graph, attrs["function"], *sides), "float32")

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        return {**op.attrs, "integers": reads_integers(op, program)}, {}

    @staticmethod
    def _onnx(graph: Graph, function: str, a: str, b: str) -> str:
        found = graph.node(_ONNX[function], a, b)
        return graph.node("Not", found) if function == "ne" else found


def _unit(op: Op, program: Program, index: int) -> float:
    mantissa, exponent = (int(program.constant(op, role)[index]) for role in ("mantissa", "exponent"))
    return math.ldexp(mantissa, exponent)


def _compared(call: Call, value: Any, other: Any) -> Ref:
    """An operand as a node; whole numbers that meet integers are integers."""
    if not isinstance(value, Ref | Tensor | int | float):
        raise call.refuse(f"compares with a {type(value).__name__}", "Use tensors and real numbers")
    plain = number(value)
    if plain is None:
        return call.ref(value)
    if not math.isfinite(plain):
        raise call.refuse(f"compares with {plain}, which no code stands for", "Compare with a finite number")
    if content_of(other) != "float" and plain == int(plain):
        return call.ref(torch.tensor(int(plain)))
    return call.ref(value)


# -- logic -------------------------------------------------------------------------------------------------------------

_LOGIC: dict[str, tuple[Any, ...]] = {
    "not": (torch.logical_not, torch.bitwise_not, operator.invert, "logical_not", "bitwise_not", "__invert__"),
    "and": (torch.logical_and, torch.bitwise_and, operator.and_, "logical_and", "bitwise_and", "__and__", "__rand__"),
    "or": (torch.logical_or, torch.bitwise_or, operator.or_, "logical_or", "bitwise_or", "__or__", "__ror__"),
    "xor": (torch.logical_xor, torch.bitwise_xor, operator.xor, "logical_xor", "bitwise_xor", "__xor__", "__rxor__"),
}
_LOGIC_OF = {target: function for function, targets in _LOGIC.items() for target in targets}


class Logical(Operator):
    """Logic on truth values, with the attribute ``function`` one of not, and, or, xor."""

    name = "logical"
    functions = tuple(target for target in _LOGIC_OF if not isinstance(target, str))
    methods = tuple(target for target in _LOGIC_OF if isinstance(target, str))

    def trace(self, call: Call) -> Any:
        function = _LOGIC_OF[call.function]
        found = call.bind("input", "other")
        values = [found.get("input")] if function == "not" else [found.get("input"), found.get("other")]
        called = str(getattr(call.function, "__name__", call.function))
        if not called.startswith("logical") and any(content_of(value) != "bool" for value in values):
            raise call.refuse("bits of integers", "Use truth values; compare with 0 to get them")
        return Traced(tuple(truth(call, value) for value in values), {"function": function})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        compute: Callable[..., Tensor] = getattr(torch, f"logical_{attrs['function']}")
        return compute(*inputs)

    def lower(self, low: Lowering) -> None:
        low.emit("logical", {"function": low.attrs["function"]})

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        return 0, 1

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        axes = len(program.values[op.output].shape)
        return lambda *inputs: self.forward(op.attrs, {}, *(aligned(x, axes) for x in inputs)).float()

    def regions(self, op: Op, program: Program) -> Regions:
        return pointwise(op, program)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        graph.write(op.output, self._onnx(graph, op.attrs["function"], op.inputs))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.cast(self._onnx(graph, attrs["function"], inputs), "float32")

    @staticmethod
    def _onnx(graph: Graph, function: str, inputs: Sequence[str]) -> str:
        return graph.node(function.capitalize(), *(export_truth(graph, x) for x in inputs))


def truth(call: Call, value: Any) -> Ref:
    """``value`` as truth values: itself, or whether it is not 0 (step ``.ne``)."""
    if isinstance(value, Ref) and value.content != "bool":
        zero = call.ref(torch.tensor(0 if value.content == "int" else 0.0))
        return call.emit("compare", [value, zero], {"function": "ne"}, suffix=".ne")
    if not isinstance(value, Ref | Tensor | int | float):
        raise call.refuse(f"logic on a {type(value).__name__}", "Use tensors of truth values")
    return value if isinstance(value, Ref) else call.ref(torch.as_tensor(value).bool())
