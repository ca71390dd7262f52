"""Where real numbers become codes and codes become real numbers: quantize, dequantize and the stubs users place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qatlib.errors import ProgramError
from qatlib.fake.stubs import DeQuantStub, QuantStub
from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.masks import FILL
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering


def quantize(x: Tensor, scale: float, lo: int, hi: int) -> Tensor:
    """Section 2: codes of ``x`` in float32. The divisor is a tensor: CUDA multiplies by the reciprocal of a number."""
    return (x / torch.tensor(scale, dtype=torch.float32, device=x.device)).round_().clamp_(lo, hi)


def quantize_numbers(x: Tensor, scale: float, lo: int, hi: int, where: str, fix: str) -> Tensor:
    """:func:`quantize`; raises ProgramError (QAT181) at ``where`` if ``x`` holds NaN, which has no code."""
    codes = quantize(x, scale, lo, hi)
    if bool(codes.isnan().any()):
        raise ProgramError("QAT181", where, f"holds {int(x.isnan().sum())} NaN of {x.numel()} elements", fix)
    return codes


def _one_ref(call: Call) -> Ref:
    x = call.args[0]
    if not isinstance(x, Ref):
        raise call.refuse("stub around a constant", "Place the stub around an activation")
    return x


class Quantize(Operator):
    name = "quantize"
    modules = (QuantStub,)

    def trace(self, call: Call) -> Traced:
        assert isinstance(call.module, QuantStub)
        attrs = {} if call.module.scale is None else {"scale": float(call.module.scale)}
        return Traced((_one_ref(call),), attrs)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        """The input; where it may hold masks, -inf as a finite number, for it has a code as well."""
        return inputs[0].clamp(min=FILL) if "below_maximum" in attrs else inputs[0]

    def lower(self, low: Lowering) -> None:
        low.emit(self.name, {})

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        qtype = program.values[op.output].qtype
        assert qtype.scale is not None
        scale, (lo, hi) = qtype.scale, qtype.limits

        fix = "Clean the input: integers have no NaN"
        return lambda x: quantize_numbers(x, scale, lo, hi, op.inputs[0], fix)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        graph.write(op.output, graph.quantize(op.inputs[0], graph.qtype(op.output)))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return inputs[0]


class Dequantize(Operator):
    name = "dequantize"
    modules = (DeQuantStub,)

    def trace(self, call: Call) -> Traced:
        return Traced((_one_ref(call),))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        (x,) = program.in_values(op)
        if "scale" in op.consts:
            scales = program.constant(op, "scale").double()
            return lambda acc: (acc.double() * scales).float()
        assert x.qtype.scale is not None
        scale = torch.tensor(x.qtype.scale, dtype=torch.float32, device=program.device)
        return lambda codes: codes * scale

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        if "scale" in op.consts:
            scales = graph.constant(program.constant(op, "scale").numpy().astype(np.float64))
            graph.write(op.output, graph.node("Mul", graph.read(op.inputs[0], "float64"), scales))
        else:
            graph.write(op.output, graph.real(op.inputs[0]))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return inputs[0]
