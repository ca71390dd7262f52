"""A float island: an operator that ``hybrid`` or ``preserve`` keeps in float inside an integer Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from qatlib.ops.base import BY_NAME, Attrs, Kernel, Operator, Params, Range
from qatlib.ops.boundary import quantize_numbers
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph

_FIX = "It runs in float: give it inputs for which it is defined, or take it out of qat.hybrid or convert.preserve"


class FloatOp(Operator):
    name = "float_op"

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return BY_NAME[attrs["operator"]].forward(attrs["attrs"], params, *inputs)

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        scales = [value.qtype.scale for value in program.in_values(op)]
        params = {role: program.constant(op, role) for role in op.consts}
        out = program.values[op.output].qtype

        def run(*inputs: Tensor) -> Tensor:
            reals = [x if s is None else x.float() * s for x, s in zip(inputs, scales, strict=True)]
            real = self.forward(op.attrs, params, *reals)
            return real if out.scale is None else quantize_numbers(real, out.scale, *out.limits, op.name, _FIX)

        return run

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        """Float kernels of two runtimes round differently, so the integers behind an island may differ."""
        real = self.export_float(op.attrs, [graph.real(name) for name in op.inputs], _params(op, program, graph), graph)
        out = graph.qtype(op.output)
        graph.write(op.output, real if out.scale is None else graph.quantize(real, out))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return BY_NAME[attrs["operator"]].export_float(attrs["attrs"], inputs, consts, graph)

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        return op.attrs, _params(op, program, graph)


def _params(op: Op, program: Program, graph: Graph) -> dict[str, str]:
    return {role: graph.constant(program.constant(op, role).numpy(), key) for role, key in op.consts.items()}
