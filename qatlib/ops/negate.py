"""Negation and absolute value: the scale is kept, the lowest code saturates."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qatlib.ops.base import Attrs, Call, Kernel, Params, Range, Ref, Traced
from qatlib.ops.elementwise import Elementwise
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering


class SignChange(Elementwise):
    """A function of the sign alone."""

    keeps_scale = True
    onnx: ClassVar[str]

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """The function, on real numbers or codes."""

    def trace(self, call: Call) -> Traced:
        x = call.bind("input")["input"]
        if not isinstance(x, Ref) or x.content == "bool":
            raise call.refuse(f"{self.name} of a constant or of truth values", "Use it on activations")
        return Traced((x,))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return self.compute(inputs[0])

    def lower(self, low: Lowering) -> None:
        low.emit(self.name, {})

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        highest = program.values[op.output].qtype.limits[1]
        return lambda x: self.compute(x).clamp_(max=highest)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        x = graph.node(self.onnx, graph.read(op.inputs[0], "float64"))
        graph.write(op.output, graph.clip(x, *program.values[op.output].qtype.limits))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node(self.onnx, *inputs)


class Neg(SignChange):
    name = "neg"
    functions = (torch.neg, torch.negative, operator.neg)
    methods = ("neg", "neg_", "negative", "negative_", "__neg__")
    onnx = "Neg"

    def compute(self, x: Tensor) -> Tensor:
        return -x

    def real_range(self, attrs: Attrs, low: float, high: float) -> tuple[float, float]:
        return -high, -low

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        lo, hi = ranges[0]
        return -hi, min(-lo, value.qtype.limits[1])


class Abs(SignChange):
    name = "abs"
    functions = (torch.abs, torch.absolute, operator.abs, abs)
    methods = ("abs", "abs_", "absolute", "absolute_", "__abs__")
    onnx = "Abs"

    def compute(self, x: Tensor) -> Tensor:
        return x.abs()

    def real_range(self, attrs: Attrs, low: float, high: float) -> tuple[float, float]:
        return max(low, -high, 0.0), max(-low, high)

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        lo, hi = ranges[0]
        return max(lo, -hi, 0), min(max(-lo, hi), value.qtype.limits[1])
