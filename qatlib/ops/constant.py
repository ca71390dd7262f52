"""A constant tensor that activations meet: a parameter, a buffer, a number, or what the model computes from those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qatlib.ops.base import Attrs, Cost, Kernel, Operator, Params, Range
from qatlib.ops.boundary import quantize
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering


class Constant(Operator):
    """Its elements are codes by section 2, of the scale that its own largest magnitude gives; a number c is 64 codes
    of |c|/64.
    """

    name = "constant"

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return params["value"]

    def lower(self, low: Lowering) -> None:
        value = low.params["value"].detach()
        if low.out.scale is not None and value.is_floating_point():
            value = quantize(value, low.out.scale, *low.out.limits)
        low.emit(self.name, {}, {"value": value.to(getattr(torch, low.out.dtype))})

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        return value.qtype.limits

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        codes = program.constant(op, "value")
        codes = codes.to(torch.float64 if program.values[op.output].qtype.dtype == "int32" else torch.float32)
        return lambda: codes

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        graph.write(op.output, graph.constant(program.constant(op, "value").cpu().numpy(), op.consts["value"]))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return consts["value"]

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        codes, scale = program.constant(op, "value").cpu(), program.values[op.output].qtype.scale
        return {}, {"value": graph.constant((codes.float() * (scale or 1.0)).numpy(), op.consts["value"])}

    def cost(self, op: Op, program: Program) -> Cost:
        return Cost(weight_bytes=program.constant(op, "value").nbytes)
