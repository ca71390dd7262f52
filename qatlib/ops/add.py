"""Addition of two activations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qatlib.factors import factors
from qatlib.integer import Requantizer
from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.clamp import apply_clamp
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.lowering import Lowering


class Add(Operator):
    name = "add"
    takes_clamp = True
    functions = (torch.add, operator.add, operator.iadd)
    methods = ("add", "add_")

    def trace(self, call: Call) -> Traced:
        found = call.bind("input", "other", alpha=1)
        a, b = found["input"], found["other"]
        if not (isinstance(a, Ref) and isinstance(b, Ref)) or found["alpha"] != 1:
            raise call.refuse(
                "adds a constant or uses alpha; both operands have to be activations",
                "Fold the constant into the bias of the layer before it",
            )
        return Traced((a, b))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return apply_clamp(inputs[0] + inputs[1], attrs.get("clamp"))

    def lower(self, low: Lowering) -> None:
        ratios = [low.input_scale(i) / low.output_scale for i in (0, 1)]
        multipliers, shift = factors(ratios, low.bits, low.name)
        lo, hi = low.output_clamp()
        low.emit(
            self.name,
            {"lo": lo, "hi": hi},
            {
                "multiplier": torch.tensor(multipliers, dtype=torch.int32),
                "shift": torch.tensor([shift], dtype=torch.int32),
            },
        )

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        multipliers, shift = program.constant(op, "multiplier"), program.constant(op, "shift")
        bounds = [max(-lo, hi) for lo, hi in ranges]
        requantize = Requantizer.plan([multipliers[:1], multipliers[1:]], shift, bounds, op.attrs["lo"], op.attrs["hi"])
        axes = len(program.values[op.output].shape)

        def aligned(x: Tensor) -> Tensor:
            return x.view(*[1] * (axes - x.dim()), *x.shape) if x.dim() < axes else x

        return lambda a, b: requantize(aligned(a), aligned(b))
