"""A float island: an operator that ``hybrid`` or ``preserve`` keeps in float inside an integer Program."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qatlib.ops.base import BY_NAME, Attrs, Kernel, Operator, Params, Range
from qatlib.ops.boundary import quantize
from qatlib.program import Op, Program


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
            return real if out.scale is None else quantize(real, out.scale, *out.limits)

        return run
