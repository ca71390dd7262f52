"""Addition and subtraction."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qatlib.integer import Requantizer
from qatlib.ops.base import Attrs, Call, Kernel, Params, Range, Ref, Traced
from qatlib.ops.clamp import apply_clamp, export_clamp
from qatlib.ops.composite import INT16
from qatlib.ops.elementwise import (
    Elementwise,
    aligned,
    constants,
    export_reals,
    export_saturated,
    number,
    operand,
    promoted,
    saturated,
    sum_factors,
    whole,
)
from qatlib.ops.masks import FILL
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering


def weighted_sum(call: Call, a: Any, b: Any, weight: Any) -> Any:
    """``a + weight * b`` as one node: ``add`` for weight 1, ``sub`` otherwise, which fusion leaves alone.

    Adding the number 0 adds no node; of truth values the sum is ``or``.
    """
    factor = number(weight)
    if factor is None:
        raise call.refuse(f"alpha is a {type(weight).__name__}", "Use a plain number")
    content = promoted(a, b, *([factor] if factor not in (1, -1) else []))
    for x, other in ((a, b), (b, a)):
        if isinstance(x, Ref) and x.content == content and number(other) == 0 and (x is a or factor == 1):
            return x
    if content == "bool":
        if factor != 1:
            raise call.refuse("a difference of truth values", "Use ^, & and ~")
        return Traced((operand(call, a, content), operand(call, b, content)), {"function": "or"}, op="logical")
    if factor == 1 and content == "float":
        for x, mask in ((a, b), (b, a)):
            if isinstance(x, Ref) and isinstance(mask, Tensor) and bool((mask <= FILL).any()):
                return _masked(call, x, mask)
    inputs = (operand(call, a, content), operand(call, b, content))
    return Traced(inputs, op="add") if factor == 1 else Traced(inputs, {"alpha": -factor}, op="sub")


def _masked(call: Call, x: Ref, mask: Tensor) -> Traced:
    """x plus a constant that goes down to :data:`FILL`: step ``.bias`` adds the others, then those are put in."""
    hidden = mask <= FILL
    if bool((mask[~hidden] != 0).any()):
        kept = call.derive(mask, "kept", lambda m: m.masked_fill(hidden, 0.0))
        x = call.emit("add", [x, call.ref(kept)], suffix=".bias", format=INT16)
    return Traced((call.ref(hidden), x), {"true": FILL, "false": None}, op="where")


class Add(Elementwise):
    """``a + alpha * b`` (attribute ``alpha``, 1 unless given)."""

    name = "add"
    operation = "add"
    takes_clamp = True
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.add, operator.add, operator.iadd)
    methods: ClassVar[tuple[str, ...]] = ("add", "add_", "__add__", "__radd__")

    def trace(self, call: Call) -> Any:
        found = call.bind("input", "other", alpha=1)
        return weighted_sum(call, found.get("input"), found.get("other"), found["alpha"])

    def weight(self, attrs: Attrs) -> float:
        """What the second operand is multiplied by."""
        return float(attrs.get("alpha", 1))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        a, b = inputs
        weight = self.weight(attrs)
        if abs(weight) != 1:
            b = b * (weight if b.is_floating_point() else int(weight))
        return apply_clamp(a - b if weight == -1 else a + b, attrs.get("clamp"))

    def lower(self, low: Lowering) -> None:
        lo, hi = low.output_clamp()
        weight = self.weight(low.attrs)
        if low.out.scale is None:
            low.emit("add", {"lo": lo, "hi": hi}, constants([1, int(weight)], [0]))
            return
        ratios = low.input_scale(0) / low.output_scale, weight * low.input_scale(1) / low.output_scale
        first, second, reach = (-qtype.limits[0] for qtype in (*(value.qtype for value in low.inputs), low.out))
        m1, m2, shift = sum_factors(ratios, (first, second), reach, low.bits, low.name)
        low.emit("add", {"lo": lo, "hi": hi}, constants([m1, m2], [shift]))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        multipliers, shift = program.constant(op, "multiplier"), program.constant(op, "shift")
        axes = len(program.values[op.output].shape)
        if whole(op, program):
            m1, m2 = multipliers.tolist()
            return lambda a, b: saturated(a.long() * m1 + b.long() * m2)
        bounds = [max(-lo, hi) for lo, hi in ranges]
        requantize = Requantizer.plan([multipliers[:1], multipliers[1:]], shift, bounds, op.attrs["lo"], op.attrs["hi"])
        return lambda a, b: requantize(aligned(a, axes), aligned(b, axes))

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        m1, m2 = program.constant(op, "multiplier").numpy()
        if whole(op, program):
            terms = [(graph.read(name, "int64"), m) for name, m in zip(op.inputs, (m1, m2), strict=True)]
            a, b = (x if m == 1 else graph.node("Mul", x, graph.constant(np.array(m, np.int64))) for x, m in terms)
            graph.write(op.output, export_saturated(graph, graph.node("Add", a, b)))
            return
        a, b = (graph.read(name, "float64") for name in op.inputs)
        shift = program.constant(op, "shift").numpy()
        graph.write(op.output, graph.requantize([(a, m1), (b, m2)], shift, op.attrs["lo"], op.attrs["hi"]))

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        """The weights as the multipliers and scales say, which is 1 or -1 but for the rounding of the multiplier."""
        multipliers = program.constant(op, "multiplier").tolist()
        (shift,) = program.constant(op, "shift").tolist()
        scales = [value.qtype.scale or 1.0 for value in program.in_values(op)]
        out = program.values[op.output].qtype.scale or 1.0
        weights = [m * 2.0**-shift * out / scale for m, scale in zip(multipliers, scales, strict=True)]
        near = 2.0 ** (1 - program.meta.get("multiplier_bits", 8))
        plain = [float(np.sign(w)) if abs(abs(w) - 1) < near else w for w in weights]
        attrs, consts = super().float_form(op, program, graph)
        return {**attrs, "weights": plain}, consts

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        (a, w_a), (b, w_b) = zip(
            export_reals(graph, inputs, attrs), attrs.get("weights", (1, self.weight(attrs))), strict=True
        )
        a = a if w_a == 1 else graph.node("Mul", a, graph.constant(np.float32(w_a)))
        b = b if abs(w_b) == 1 else graph.node("Mul", b, graph.constant(np.float32(w_b)))
        return export_clamp(graph, graph.node("Sub" if w_b == -1 else "Add", a, b), attrs.get("clamp"))


class Sub(Add):
    """``a - alpha * b`` (attribute ``alpha``, 1 unless given); the Program op is ``add``."""

    name = "sub"
    functions = (torch.sub, torch.subtract, operator.sub, operator.isub, torch.rsub)
    methods = ("sub", "sub_", "subtract", "subtract_", "__sub__", "__rsub__")

    def trace(self, call: Call) -> Any:
        found = call.bind("input", "other", alpha=1)
        a, b, alpha = found.get("input"), found.get("other"), number(found["alpha"])
        if call.function in (torch.rsub, "__rsub__"):
            a, b = b, a
        return weighted_sum(call, a, b, None if alpha is None else -alpha)

    def weight(self, attrs: Attrs) -> float:
        return -float(attrs.get("alpha", 1))
