"""Linear layer over the last axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.integer import Product
from qatlib.ops.base import Attrs, Call, Traced
from qatlib.ops.dense import Dense
from qatlib.ops.region import Regions, vector_axes
from qatlib.ops.work import Work, rows_of
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Array, Graph
    from qatlib.export.integer import ByteProduct, IntegerGraph


class Linear(Dense):
    name = "linear"
    modules = (nn.Linear,)
    functions = (F.linear,)
    channel_axis = -1

    def trace(self, call: Call) -> Traced:
        if isinstance(call.module, nn.Linear):
            found = {**call.bind("input"), "weight": call.module.weight, "bias": call.module.bias}
        else:
            found = call.bind("input", "weight", "bias", bias=None)
        return self.weighted(call, found["input"], found["weight"], found["bias"], {})

    def geometry_attrs(self, attrs: Attrs) -> dict[str, Any]:
        return {}

    def float_product(self, attrs: Attrs, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def product(self, op: Op) -> Product:
        return F.linear

    def over_channels(self, vector: Tensor, axes: int) -> Tensor:
        return vector

    def export_bytes(self, op: Op, graph: IntegerGraph) -> ByteProduct:
        def product(x: str, zero_point: str, weight: Array) -> str:
            inputs = (x, graph.constant(weight.T, op.consts["weight"]), *([zero_point] if zero_point else []))
            return graph.node("MatMulInteger", *inputs)

        return product

    def export_product(self, attrs: Attrs, x: str, weight: str, bias: str, graph: Graph) -> str:
        return graph.node("Add", graph.node("MatMul", x, graph.node("Transpose", weight, perm=[1, 0])), bias)

    def regions(self, op: Op, program: Program) -> Regions:
        inputs = program.in_values(op)[0].shape[-1]
        return Regions(
            vector_axes(program.values[op.output]),
            lambda box: self.channel_part(op, program, box, box[-1], (*box[:-1], (0, inputs))),
        )

    def work(self, op: Op, program: Program) -> Work:
        sizes = rows_of(program.in_values(op)[0]), rows_of(program.values[op.output])
        return Work("sums", *sizes, overlays=tuple(range(1, len(op.inputs))))
