"""Reductions over axes: sum, mean, amax, amin, var, std."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qatlib.factors import lone_factor
from qatlib.integer import EXACT_FLOAT32, INT32, Requantizer
from qatlib.ops.base import Attrs, Call, Cost, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.composite import INT16, Composite
from qatlib.ops.region import Regions, over_kept
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering


def positions(call: Call, x: Ref, dim: Any) -> list[int]:
    """The axes that ``dim`` names, ascending; None names all. The batch is refused."""
    count = len(x.shape)
    named = range(count) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    axes = sorted({int(axis) % count for axis in named})
    if any(x.shape[axis] < 0 for axis in axes):
        seen = "reduces the batch axis, so one sample would depend on the others"
        raise call.refuse(seen, "Reduce the other axes: x.mean(dim=(1, 2, 3))")
    return axes


def reduced(call: Call, x: Ref, axes: Sequence[int]) -> int:
    """Number of elements that a reduction over ``axes`` puts together."""
    return math.prod(x.shape[axis] for axis in axes)


def _found(call: Call, *names: str, **defaults: Any) -> dict[str, Any]:
    """Arguments with NumPy's spellings of the axes as torch takes them."""
    kwargs = {{"axis": "dim", "keepdims": "keepdim"}.get(key, key): value for key, value in call.kwargs.items()}
    found = Call(call.where, call.args, kwargs).bind("input", *names, dim=None, keepdim=False, **defaults)
    if not isinstance(found["input"], Ref):
        raise call.refuse("reduction of a constant", "Compute the constant once, in __init__")
    return found


class Sum(Operator):
    """``sum(x over axes) / divisor``: a sum, or a mean. Attributes ``axes``, ``keepdim``, ``divisor``."""

    name = "sum"
    form = "reduction"
    functions = (torch.sum, torch.mean)
    methods = ("sum", "mean")

    def trace(self, call: Call) -> Traced:
        found = _found(call, "dim", "keepdim")
        x = found["input"]
        axes = positions(call, x, found["dim"])
        mean = call.function in (torch.mean, "mean")
        divisor = reduced(call, x, axes) if mean else 1
        return Traced((x,), {"axes": axes, "keepdim": bool(found["keepdim"]), "divisor": divisor})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        total = inputs[0].sum(attrs["axes"], attrs["keepdim"])
        return total if attrs["divisor"] == 1 else total / attrs["divisor"]

    def lower(self, low: Lowering) -> None:
        count = math.prod(low.inputs[0].shape[axis] for axis in low.attrs["axes"])
        attrs = {key: low.attrs[key] for key in ("axes", "keepdim")} | {"acc_bound": count * low.largest(0)}
        if low.out.dtype == "int32":
            low.emit(self.name, attrs)
            return
        divisor = low.attrs["divisor"]
        m, n = lone_factor(low.input_scale(0) / (low.output_scale * divisor), low.bits, low.name)
        attrs["divisor"] = divisor
        attrs["lo"], attrs["hi"] = low.output_clamp()
        consts = {"multiplier": torch.tensor([m], dtype=torch.int32), "shift": torch.tensor([n], dtype=torch.int32)}
        low.emit(self.name, attrs, consts)

    # -- integer -------------------------------------------------------------------------------------------------

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        if "lo" not in op.attrs:
            return value.qtype.limits
        # Proven without the constants: signs are kept, so sums of squares are known to be no less than 0.
        lo, hi = ranges[0]
        return op.attrs["lo"] if lo < 0 else max(0, op.attrs["lo"]), op.attrs["hi"] if hi > 0 else 0

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        axes, keepdim = op.attrs["axes"], op.attrs["keepdim"]
        count = math.prod(program.in_values(op)[0].shape[axis] for axis in axes)
        bound = count * max(-ranges[0][0], ranges[0][1])
        carrier = torch.float32 if bound < EXACT_FLOAT32 and "lo" in op.attrs else torch.float64

        def total(x: Tensor) -> Tensor:
            acc = x.sum(axes, keepdim, dtype=carrier)
            return acc.clamp_(*INT32) if bound > INT32[1] else acc

        if "lo" not in op.attrs:
            return total
        m, n = program.constant(op, "multiplier"), program.constant(op, "shift")
        requantize = Requantizer.plan([m], n, [min(bound, 2**31)], op.attrs["lo"], op.attrs["hi"])
        return lambda x: requantize(total(x), reuse=True)

    def regions(self, op: Op, program: Program) -> Regions:
        return over_kept(op, program, op.attrs["axes"], op.attrs["keepdim"])

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        elements = program.in_values(op)[0].elements()
        return Cost(0, elements, base.weight_bytes, base.input_bytes, base.output_bytes)

    # -- ONNX ----------------------------------------------------------------------------------------------------

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        acc = _onnx_reduce(graph, "ReduceSum", graph.read(op.inputs[0], "float64"), op.attrs)
        acc = graph.saturate(acc, op.attrs["acc_bound"])
        if "lo" in op.attrs:
            m, n = program.constant(op, "multiplier").numpy(), program.constant(op, "shift").numpy()
            acc = graph.requantize([(acc, m)], n, op.attrs["lo"], op.attrs["hi"])
        graph.write(op.output, acc)

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        total = _onnx_reduce(graph, "ReduceSum", inputs[0], attrs)
        divisor = attrs.get("divisor", 1)
        return total if divisor == 1 else graph.node("Div", total, graph.constant(np.float32(divisor)))


def _onnx_reduce(graph: Graph, op_type: str, x: str, attrs: Attrs) -> str:
    axes = graph.constant(np.array(attrs["axes"], np.int64))
    return graph.node(op_type, x, axes, keepdims=int(attrs["keepdim"]))


class Extreme(Operator):
    """Largest or smallest element over axes; a code of the input. Attributes ``axes``, ``keepdim``."""

    keeps_scale = True
    form = "reduction"
    compute: ClassVar[Callable[..., Tensor]]
    onnx: ClassVar[str]

    def trace(self, call: Call) -> Traced:
        found = _found(call, "dim", "keepdim")
        axes = positions(call, found["input"], found["dim"])
        return Traced((found["input"],), {"axes": axes, "keepdim": bool(found["keepdim"])})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return type(self).compute(inputs[0], attrs["axes"], attrs["keepdim"])

    def lower(self, low: Lowering) -> None:
        low.emit(self.name, {key: low.attrs[key] for key in ("axes", "keepdim")})

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        return lambda x: self.forward(op.attrs, {}, x)

    def regions(self, op: Op, program: Program) -> Regions:
        return over_kept(op, program, op.attrs["axes"], op.attrs["keepdim"])

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        return Cost(0, program.in_values(op)[0].elements(), 0, base.input_bytes, base.output_bytes)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        dtype = "float64" if graph.qtype(op.inputs[0]).dtype == "int32" else "float32"
        graph.write(op.output, _onnx_reduce(graph, self.onnx, graph.read(op.inputs[0], dtype), op.attrs))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return _onnx_reduce(graph, self.onnx, inputs[0], attrs)


class AMax(Extreme):
    name = "amax"
    functions = (torch.amax,)
    methods = ("amax",)
    compute = staticmethod(torch.amax)
    onnx = "ReduceMax"


class AMin(Extreme):
    name = "amin"
    functions = (torch.amin,)
    methods = ("amin",)
    compute = staticmethod(torch.amin)
    onnx = "ReduceMin"


# -- variance ----------------------------------------------------------------------------------------------------------


def centred(call: Call, x: Ref, axes: Sequence[int]) -> tuple[Ref, Ref]:
    """Steps ``.mean`` and ``.sub`` of x over ``axes``: the mean, with axes of size 1, and x minus its mean."""
    sizes = {"axes": list(axes), "keepdim": True, "divisor": reduced(call, x, axes)}
    mean = call.emit("sum", [x], sizes, suffix=".mean", format=INT16)
    return mean, call.emit("sub", [x, mean], suffix=".sub", format=INT16)


def squared(call: Call, x: Ref) -> Ref:
    """Step ``.square``: x times itself. One channel far out leaves the squares of the others few codes, and an
    interpolated table would be wrong by a good part of these.
    """
    return call.emit("mul", [x, x], suffix=".square", format=INT16)


class Variance(Composite):
    """var, std and var_mean: ``.mean .sub .square .var``, for std ``.sqrt``."""

    name = "var"
    functions = (torch.var, torch.std, torch.var_mean, torch.std_mean)
    methods = ("var", "std")

    def trace(self, call: Call) -> Any:
        found = _found(call, "dim", "unbiased", "keepdim", correction=None)
        x, dim = found["input"], found["dim"]
        if isinstance(dim, bool):
            dim, found["unbiased"] = None, dim
        axes = positions(call, x, dim)
        correction = found.get("correction")
        if correction is None:
            correction = 1 if found.get("unbiased", True) in (True, None) else 0
        divisor, keepdim = reduced(call, x, axes) - correction, bool(found["keepdim"])
        if divisor < 1 or divisor != int(divisor):
            raise call.refuse(f"divides by {divisor}", "Use correction=0, or reduce more elements")
        name = call.function if isinstance(call.function, str) else call.function.__name__
        root, mean_too = name.startswith("std"), name.endswith("mean")
        mean, rest = centred(call, x, axes)
        attrs = {"axes": axes, "keepdim": keepdim, "divisor": int(divisor)}
        out = call.emit("sum", [squared(call, rest)], attrs, suffix=".var", format=INT16 if root else None)
        if root:
            out = call.emit("unary", [out], {"function": "sqrt"}, suffix=".sqrt")
        if mean_too and not keepdim:
            shape = [max(size, -1) for axis, size in enumerate(mean.shape) if axis not in axes]
            mean = call.emit("reshape", [mean], {"shape": shape}, suffix=".squeeze")
        return (out, mean) if mean_too else out
