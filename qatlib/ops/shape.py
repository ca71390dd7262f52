"""Operators that move bits and change none: reshape, flatten, view, permute, transpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qatlib.ops.base import Attrs, Call, Cost, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.lowering import Lowering


class Reshape(Operator):
    """The target shape is that of the traced output, so ``view(x.size(0), -1)`` and ``flatten(1)`` are the same."""

    name = "reshape"
    modules = (nn.Flatten, nn.Unflatten)
    functions = (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze)
    methods = ("flatten", "reshape", "view", "squeeze", "unsqueeze")
    keeps_scale = True

    def trace(self, call: Call) -> Traced:
        x = call.bind("input")["input"]
        if not isinstance(x, Ref):
            raise call.refuse("reshape of a constant", "Reshape the constant once, in __init__")
        if call.out_shape.count(-1) > 1:
            raise call.refuse("the batch size appears in two axes of the result", "Keep the batch in one axis")
        return Traced((x,), {"shape": list(call.out_shape)})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(attrs["shape"])

    def lower(self, low: Lowering) -> None:
        low.emit(self.name, {"shape": low.attrs["shape"]})

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        shape = op.attrs["shape"]
        return lambda x: x.reshape(shape)

    def cost(self, op: Op, program: Program) -> Cost:
        return Cost()


class Permute(Operator):
    name = "permute"
    functions = (torch.permute, torch.transpose)
    methods = ("permute", "transpose")
    keeps_scale = True

    def trace(self, call: Call) -> Traced:
        x = call.bind("input")["input"]
        if not isinstance(x, Ref):
            raise call.refuse("permute of a constant", "Permute the constant once, in __init__")
        dims = list(range(len(x.shape)))
        if call.function in (torch.transpose, "transpose"):
            found = call.bind("input", "dim0", "dim1")
            i, j = found["dim0"], found["dim1"]
            dims[i], dims[j] = dims[j], dims[i]
        else:
            order = call.kwargs.get("dims", call.args[1:])
            order = order[0] if len(order) == 1 and isinstance(order[0], list | tuple) else order
            dims = [int(axis) % len(dims) for axis in order]
        return Traced((x,), {"dims": dims})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0].permute(attrs["dims"])

    def lower(self, low: Lowering) -> None:
        low.emit(self.name, {"dims": low.attrs["dims"]})

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        dims = op.attrs["dims"]
        return lambda x: x.permute(dims)
