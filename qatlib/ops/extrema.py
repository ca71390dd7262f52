"""The larger or smaller of two tensors, element by element."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from qatlib.ops.base import Attrs, Call, Kernel, Params, Range, Ref, Traced
from qatlib.ops.elementwise import (
    Elementwise,
    aligned,
    branch_factors,
    branch_requantizers,
    export_branches,
    export_reals,
    operand,
    promoted,
    whole,
)
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering


def extremum(call: Call, op: str, a: Any, b: Any) -> Traced:
    """``maximum`` or ``minimum`` (``op``) of two tensors as one node; with a constant of one element a clamp."""
    content = promoted(a, b)
    if content == "bool":
        raise call.refuse(f"{op} of truth values", "Use | or &")
    for x, other in ((a, b), (b, a)):
        single = isinstance(other, Tensor) and other.numel() == 1 and not isinstance(other, nn.Parameter)
        if single and isinstance(x, Ref) and x.content == content and other.dim() <= len(x.shape):
            bound = other.item()
            return Traced((x,), {"clamp": [bound, None] if op == "maximum" else [None, bound]}, op="clamp")
    return Traced((operand(call, a, content), operand(call, b, content)), op=op)


class Maximum(Elementwise):
    name = "maximum"
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.maximum, torch.fmax)
    methods: ClassVar[tuple[str, ...]] = ("maximum", "fmax")
    onnx: ClassVar[str] = "Max"

    def pick(self, a: Tensor, b: Tensor) -> Tensor:
        """The function, on real numbers or codes."""
        return torch.maximum(a, b)

    def trace(self, call: Call) -> Any:
        found = call.bind("input", "other")
        return extremum(call, self.name, found.get("input"), found.get("other"))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return self.pick(*inputs)

    def lower(self, low: Lowering) -> None:
        lo, hi = low.out.limits
        low.emit(self.name, {"lo": lo, "hi": hi}, branch_factors(low, [0, 1]))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        if whole(op, program):
            return lambda a, b: self.pick(a.double(), b.double())
        first, second = branch_requantizers(op, program, ranges)
        axes = len(program.values[op.output].shape)
        return lambda a, b: self.pick(first(aligned(a, axes)), second(aligned(b, axes)))

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        if whole(op, program):
            terms = [graph.read(name, "float64") for name in op.inputs]
        else:
            terms = export_branches(op, program, graph, op.inputs)
        graph.write(op.output, graph.node(self.onnx, *terms))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node(self.onnx, *export_reals(graph, inputs, attrs))


class Minimum(Maximum):
    name = "minimum"
    functions = (torch.minimum, torch.fmin)
    methods = ("minimum", "fmin")
    onnx = "Min"

    def pick(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)
