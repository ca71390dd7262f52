"""Leaky relu and PReLU: one factor for x >= 0, another, of any sign, for x < 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.factors import factor
from qatlib.integer import Requantizer
from qatlib.ops.base import Attrs, Call, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.region import Regions, pointwise
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering


class PRelu(Operator):
    """``x`` where x >= 0, ``slope * x`` elsewhere. The slope is a number (attribute), or a parameter of one element or
    one per channel (axis 1).
    """

    name = "prelu"
    modules = (nn.LeakyReLU, nn.PReLU)
    functions = (F.leaky_relu, F.leaky_relu_, F.prelu)
    methods = ("prelu",)

    def trace(self, call: Call) -> Traced:
        found = call.bind("input", "negative_slope", negative_slope=0.01)
        found |= call.bind("input", "weight")
        x, module = found.get("input"), call.module
        if not isinstance(x, Ref):
            raise call.refuse("leaky relu of a constant", "Compute the constant once, in __init__")
        if isinstance(module, nn.PReLU) or call.function in (F.prelu, "prelu"):
            slope: Any = module.weight if isinstance(module, nn.PReLU) else found.get("weight")
            if not isinstance(slope, Tensor):
                raise call.refuse("PReLU takes slopes computed in the model", "Keep the slopes as a parameter")
            return Traced((x,), {}, {"slope": slope})
        slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else found["negative_slope"]
        if not isinstance(slope, int | float) or not math.isfinite(slope):
            raise call.refuse(f"negative_slope is a {type(slope).__name__}, not a finite number", "Use a plain number")
        return Traced((x,), {"slope": float(slope)})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        if "slope" in params:
            return F.prelu(inputs[0], params["slope"])
        return F.leaky_relu(inputs[0], attrs["slope"])

    def lower(self, low: Lowering) -> None:
        slopes = low.params["slope"].detach().double().tolist() if "slope" in low.params else [low.attrs["slope"]]
        positive = low.input_scale(0) / low.output_scale
        rows = []
        for slope in slopes:
            negative = slope * low.input_scale(0) / low.output_scale
            _, shift = factor(positive if abs(negative) <= positive else abs(negative), low.bits, low.name)
            rows.append((round(math.ldexp(positive, shift)), round(math.ldexp(negative, shift)), shift))
        lo, hi = low.output_clamp()
        columns = zip(("multiplier", "negative_multiplier", "shift"), zip(*rows, strict=True), strict=True)
        low.emit("prelu", {"lo": lo, "hi": hi}, {role: torch.tensor(c, dtype=torch.int32) for role, c in columns})

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        """Two terms of which one is 0: the positive and the negative part of the input."""
        per_channel = (-1, *[1] * (len(program.values[op.output].shape) - 2))
        multiplier, negative, shift = (
            program.constant(op, role).view(per_channel) for role in ("multiplier", "negative_multiplier", "shift")
        )
        lo, hi = ranges[0]
        bounds = [max(hi, 0), max(-lo, 0)]
        requantize = Requantizer.plan([multiplier, negative], shift, bounds, op.attrs["lo"], op.attrs["hi"])
        return lambda x: requantize(x.clamp(min=0), x.clamp(max=0))

    def regions(self, op: Op, program: Program) -> Regions:
        return pointwise(op, program, "multiplier", "negative_multiplier", "shift")

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        per_channel = (-1, *[1] * (len(program.values[op.output].shape) - 2))
        roles = ("multiplier", "negative_multiplier", "shift")
        m1, m2, n = (program.constant(op, role).cpu().numpy().reshape(per_channel) for role in roles)
        x, (lo, hi) = graph.read(op.inputs[0], "float64"), graph.qtype(op.inputs[0]).limits
        terms = [(graph.clip(x, 0, hi), m1), (graph.clip(x, lo, 0), m2)]
        graph.write(op.output, graph.requantize(terms, n, op.attrs["lo"], op.attrs["hi"]))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        if "slope" not in consts:
            return graph.node("LeakyRelu", inputs[0], alpha=attrs["slope"])
        axes = len(graph.program.values[graph.scope].shape)
        return graph.node("PRelu", inputs[0], graph.reshape(consts["slope"], (-1, *[1] * (axes - 2))))

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        negative, positive = (program.constant(op, role).double() for role in ("negative_multiplier", "multiplier"))
        return {}, {"slope": graph.constant((negative / positive).float().numpy())}
