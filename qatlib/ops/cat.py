"""Concatenation: every input is brought to the scale of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qatlib.factors import factor
from qatlib.integer import Requantizer
from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.lowering import Lowering


class Cat(Operator):
    name = "cat"
    functions = (torch.cat, torch.concat, torch.concatenate)

    def trace(self, call: Call) -> Traced:
        found = call.bind("tensors", "dim", dim=0)
        tensors = found["tensors"]
        if not isinstance(tensors, list | tuple) or not all(isinstance(t, Ref) for t in tensors):
            raise call.refuse("concatenates a constant", "Concatenate activations only")
        axes = len(tensors[0].shape)
        axis = int(call.kwargs.get("axis", found["dim"])) % axes
        if tensors[0].shape[axis] == -1:
            raise call.refuse("concatenates along the batch axis", "Concatenate along another axis")
        return Traced(tuple(tensors), {"axis": axis})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, attrs["axis"])

    def lower(self, low: Lowering) -> None:
        solved = [factor(low.input_scale(i) / low.output_scale, low.bits, low.name) for i in range(len(low.inputs))]
        lo, hi = low.output_clamp()
        low.emit(
            self.name,
            {"axis": low.attrs["axis"], "lo": lo, "hi": hi},
            {
                "multiplier": torch.tensor([m for m, _ in solved], dtype=torch.int32),
                "shift": torch.tensor([n for _, n in solved], dtype=torch.int32),
            },
        )

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        multipliers, shifts = program.constant(op, "multiplier"), program.constant(op, "shift")
        steps = [
            Requantizer.plan(
                [multipliers[i : i + 1]], shifts[i : i + 1], [max(-lo, hi)], op.attrs["lo"], op.attrs["hi"]
            )
            for i, (lo, hi) in enumerate(ranges)
        ]
        axis = op.attrs["axis"]
        return lambda *xs: torch.cat([step(x) for step, x in zip(steps, xs, strict=True)], axis)
