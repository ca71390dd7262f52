"""relu, relu6 and clamp: on their own they keep the scale of their input; fused they are the output clamp."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.elementwise import export_reals, operand, reads_integers
from qatlib.ops.region import Regions, pointwise
from qatlib.program import Op, Program, Value
from qatlib.qtype import QType

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering

Bounds = Sequence[float | None]


def apply_clamp(x: Tensor, bounds: Bounds | None, owned: bool = False) -> Tensor:
    """Clamp in float; ``bounds`` are real values, None is unbounded. ``owned``: nobody else reads ``x``."""
    if bounds is None:
        return x
    low, high = bounds
    inplace = owned and not x.requires_grad
    if low == 0 and high is None:
        return F.relu(x, inplace)
    return x.clamp_(low, high) if inplace else x.clamp(low, high)


def export_clamp(graph: Graph, x: str, bounds: Bounds | None) -> str:
    """:func:`apply_clamp` as an ONNX node."""
    if bounds is None:
        return x
    low, high = bounds
    if low == 0 and high is None:
        return graph.node("Relu", x)
    return graph.node("Clip", x, *("" if b is None else graph.constant(np.float32(b)) for b in (low, high)))


def output_clamp(out: QType, bounds: Bounds | None) -> tuple[int, int]:
    """Section 3: the code range of an output whose real values are clamped to ``bounds``. Integers have the unit 1."""
    lo, hi = out.limits
    if bounds is not None:
        low, high = bounds
        unit = out.scale or 1.0
        lo = lo if low is None else max(lo, min(hi, round(low / unit)))
        hi = hi if high is None else max(lo, min(hi, round(high / unit)))
    return lo, hi


_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_ONE_SIDED: dict[Any, str] = {
    torch.clamp_min: "min",
    torch.clamp_max: "max",
    **dict.fromkeys(("clamp_min", "clamp_min_"), "min"),
    **dict.fromkeys(("clamp_max", "clamp_max_"), "max"),
}
_DEFAULTS: dict[Any, tuple[float, float]] = {
    F.relu6: (0.0, 6.0),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), (-1.0, 1.0)),
}


class Clamp(Operator):
    """Attribute ``clamp``: the lower and the upper bound, None for an open side."""

    name = "clamp"
    modules = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
    functions = (
        *(F.relu, torch.relu, torch.relu_, F.relu6, F.hardtanh, F.hardtanh_),
        *(torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max),
    )
    methods = (
        *("relu", "relu_", "clamp", "clamp_", "clip", "clip_"),
        *("clamp_min", "clamp_min_", "clamp_max", "clamp_max_"),
    )
    keeps_scale = True

    def trace(self, call: Call) -> Any:
        x = call.bind("input")["input"]
        if not isinstance(x, Ref) or x.content == "bool":
            raise call.refuse("relu or clamp of a constant or of truth values", "Use it on activations")
        bounds = [_plain(bound) for bound in self._bounds(call)]
        for bound in bounds:
            if isinstance(bound, float) and math.isnan(bound):
                raise call.refuse("a clamp to NaN", "Use numbers")
            if isinstance(bound, float) and bound != int(bound) and x.content == "int":
                raise call.refuse(f"integers clamped to {bound}", "Use whole numbers")
        if all(bound is None or isinstance(bound, int | float) for bound in bounds):
            number = int if x.content == "int" else float
            return Traced((x,), {"clamp": [None if bound is None else number(bound) for bound in bounds]})
        return self._by_tensors(call, x, *bounds)

    @staticmethod
    def _by_tensors(call: Call, x: Ref, low: Any, high: Any) -> Ref:
        """Bounds that are tensors: steps ``.max`` with the lower, then ``.min`` with the upper."""
        for op, bound, suffix in (("maximum", low, ".max"), ("minimum", high, ".min")):
            if bound is not None:
                tensor = torch.tensor(float(bound)) if isinstance(bound, int | float) else bound
                x = call.emit(op, [x, operand(call, tensor, "float")], suffix=suffix)
        return x

    @staticmethod
    def _bounds(call: Call) -> Sequence[Any]:
        module, function = call.module, call.function
        if isinstance(module, nn.Hardtanh):
            return module.min_val, module.max_val
        if module is not None or function in _RELU:
            return 0.0, None
        if function in _ONE_SIDED:
            side = _ONE_SIDED[function]
            bound = call.bind("input", side)[side]
            return (bound, None) if side == "min" else (None, bound)
        if function in _DEFAULTS:
            low, high = _DEFAULTS[function]
            if function is F.relu6:
                return low, high
            found = call.bind("input", "min_val", "max_val", min_val=low, max_val=high)
            return found["min_val"], found["max_val"]
        found = call.bind("input", "min", "max", min=None, max=None)
        return found["min"], found["max"]

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return apply_clamp(inputs[0], attrs["clamp"])

    def rounds(self, attrs: Attrs) -> bool:
        """The bounds are no codes, unless they are 0."""
        return any(bound not in (0, None) for bound in attrs["clamp"])

    def real_range(self, attrs: Attrs, low: float, high: float) -> tuple[float, float]:
        least, most = (
            default if bound is None else bound
            for bound, default in zip(attrs["clamp"], (-math.inf, math.inf), strict=True)
        )
        return min(max(low, least), most), min(max(high, least), most)

    def lower(self, low: Lowering) -> None:
        lo, hi = low.output_clamp()
        low.emit(self.name, {"lo": lo, "hi": hi})

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        lo, hi = op.attrs["lo"], op.attrs["hi"]
        return min(hi, max(lo, ranges[0][0])), min(hi, max(lo, ranges[0][1]))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        lo, hi = op.attrs["lo"], op.attrs["hi"]
        return lambda x: x.clamp(lo, hi)

    def regions(self, op: Op, program: Program) -> Regions:
        return pointwise(op, program)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        carrier = "float64" if graph.qtype(op.output).dtype == "int32" else "float32"
        x = graph.read(op.inputs[0], carrier)
        graph.write(op.output, graph.clip(x, op.attrs["lo"], op.attrs["hi"], dtype=carrier))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        (x,) = export_reals(graph, inputs, attrs)
        return export_clamp(graph, x, attrs["clamp"])

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        if reads_integers(op, program):
            return {"clamp": [op.attrs["lo"], op.attrs["hi"]], "integers": True}, {}
        return super().float_form(op, program, graph)


def _plain(bound: Any) -> Any:
    """A bound as a number, or None where it is open; a tensor of more than one element, or of the graph, as it is."""
    if isinstance(bound, Tensor) and bound.numel() == 1 and not isinstance(bound, nn.Parameter):
        bound = bound.item()
    return None if isinstance(bound, float) and math.isinf(bound) else bound
