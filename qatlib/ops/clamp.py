"""relu, relu6 and clamp: on their own they keep the scale of their input; fused they are the output clamp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.program import Op, Program, Value
from qatlib.qtype import QType

if TYPE_CHECKING:
    from qatlib.lowering import Lowering

Bounds = Sequence[float | None]


def apply_clamp(x: Tensor, bounds: Bounds | None) -> Tensor:
    """Clamp in float; ``bounds`` are real values, None is unbounded."""
    if bounds is None:
        return x
    low, high = bounds
    return F.relu(x) if low == 0 and high is None else x.clamp(low, high)


def output_clamp(out: QType, bounds: Bounds | None) -> tuple[int, int]:
    """Section 3: the code range of an output whose real values are clamped to ``bounds``."""
    lo, hi = out.limits
    if bounds is not None:
        low, high = bounds
        assert out.scale is not None
        lo = lo if low is None else max(lo, min(hi, round(low / out.scale)))
        hi = hi if high is None else max(lo, min(hi, round(high / out.scale)))
    return lo, hi


class Clamp(Operator):
    name = "clamp"
    modules = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
    functions = (F.relu, torch.relu, torch.relu_, F.relu6, F.hardtanh, torch.clamp)
    methods = ("relu", "relu_", "clamp", "clamp_", "clip")
    keeps_scale = True

    def trace(self, call: Call) -> Traced:
        found = call.bind("input", "min", "max", "min_val", "max_val")
        x = found["input"]
        if not isinstance(x, Ref):
            raise call.refuse("relu or clamp of a constant", "Compute the constant once, in __init__")
        return Traced((x,), {"clamp": self._bounds(call, found)})

    def _bounds(self, call: Call, found: dict[str, Any]) -> list[float | None]:
        module = call.module
        if isinstance(module, nn.Hardtanh):
            return [float(module.min_val), float(module.max_val)]
        named = [found.get("min", found.get("min_val")), found.get("max", found.get("max_val"))]
        if any(isinstance(bound, Ref | Tensor) for bound in named):
            raise call.refuse("clamp bounds are tensors", "Use numbers")
        if call.function in (F.relu6, F.hardtanh):
            default = (0.0, 6.0) if call.function is F.relu6 else (-1.0, 1.0)
            named = [d if isinstance(n, bool | None) else n for n, d in zip(named, default, strict=True)]
        elif module is not None or call.function not in (torch.clamp, "clamp", "clamp_", "clip"):
            return [0.0, None]
        return [None if bound is None else float(bound) for bound in named]

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return apply_clamp(inputs[0], attrs["clamp"])

    def lower(self, low: Lowering) -> None:
        lo, hi = low.output_clamp()
        low.emit(self.name, {"lo": lo, "hi": hi})

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        lo, hi = op.attrs["lo"], op.attrs["hi"]
        return min(hi, max(lo, ranges[0][0])), min(hi, max(lo, ranges[0][1]))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        lo, hi = op.attrs["lo"], op.attrs["hi"]
        return lambda x: x.clamp(lo, hi)
