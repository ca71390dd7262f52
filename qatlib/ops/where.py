"""Selection by a mask: where and masked_fill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qatlib.ops.base import Attrs, Call, Kernel, Params, Range, Ref, Traced
from qatlib.ops.compare import truth
from qatlib.ops.elementwise import (
    Elementwise,
    aligned,
    branch_factors,
    branch_requantizers,
    export_branches,
    export_reals,
    export_truth,
    number,
    operand,
    promoted,
    whole,
)
from qatlib.ops.masks import FILL
from qatlib.program import Op, Program
from qatlib.qtype import QType

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering

SIDES = ("true", "false")


class Where(Elementwise):
    """``condition ? true : false``. Attributes ``true`` and ``false``: a number is that branch; None stands for the
    next tensor input.
    """

    name = "where"
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.where,)
    methods: ClassVar[tuple[str, ...]] = ("where",)

    def trace(self, call: Call) -> Any:
        if call.function == "where":
            found = call.bind("self", "condition", "other")
            return self.select(call, found.get("condition"), found.get("self"), found.get("other"))
        found = call.bind("condition", "input", "other", input=None, other=None)
        if found["input"] is None:
            raise call.refuse("where of a condition alone, which gives indices", "Pass both branches")
        return self.select(call, found.get("condition"), found["input"], found["other"])

    @staticmethod
    def select(call: Call, condition: Any, true: Any, false: Any) -> Traced:
        """The node for ``condition ? true : false``."""
        content = promoted(true, false)
        attrs: dict[str, Any] = {}
        branches = []
        for side, value in zip(SIDES, (true, false), strict=True):
            attrs[side] = number(value)
            if attrs[side] is None:
                branches.append(operand(call, value, content))
            elif math.isnan(attrs[side]) or attrs[side] == math.inf:
                raise call.refuse(f"fills with {attrs[side]}", "Use a finite number, or -inf for a mask")
            elif content == "float":
                attrs[side] = FILL if attrs[side] == -math.inf else float(attrs[side])
        return Traced((truth(call, condition), *branches), attrs, op="where")

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        condition, *branches = inputs
        rest = iter(branches)
        true, false = (next(rest) if attrs.get(side) is None else attrs[side] for side in SIDES)
        return torch.where(condition.bool(), true, false)

    def lower(self, low: Lowering) -> None:
        lo, hi = low.out.limits
        codes = {side: None if low.attrs.get(side) is None else code(low.attrs[side], low.out) for side in SIDES}
        tensors = range(1, len(low.inputs))
        low.emit("where", {**codes, "lo": lo, "hi": hi}, branch_factors(low, tensors))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        dtype = torch.float64 if whole(op, program) else torch.float32
        fills = [None if op.attrs[side] is None else torch.tensor(op.attrs[side], dtype=dtype) for side in SIDES]
        fills = [fill if fill is None else fill.to(program.device) for fill in fills]
        requantize = None if whole(op, program) else branch_requantizers(op, program, ranges[1:])
        axes = len(program.values[op.output].shape)

        def run(condition: Tensor, *branches: Tensor) -> Tensor:
            if requantize is None:
                terms = [x.double() for x in branches]
            else:
                terms = [one(aligned(x, axes)) for one, x in zip(requantize, branches, strict=True)]
            rest = iter(terms)
            true, false = (next(rest) if fill is None else fill for fill in fills)
            return torch.where(condition != 0, true, false)

        return run

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        if whole(op, program):
            terms = iter([graph.read(name, "float64") for name in op.inputs[1:]])
        else:
            terms = iter(export_branches(op, program, graph, op.inputs[1:]))
        sides = [
            next(terms) if op.attrs[side] is None else graph.constant(np.float64(op.attrs[side])) for side in SIDES
        ]
        graph.write(op.output, graph.node("Where", export_truth(graph, op.inputs[0]), *sides))

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        scale = program.values[op.output].qtype.scale or 1
        attrs, consts = super().float_form(op, program, graph)
        reals = {side: None if op.attrs[side] is None else op.attrs[side] * scale for side in SIDES}
        return {**attrs, **reals}, consts

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        terms = iter(export_reals(graph, inputs[1:], attrs))
        sides = [next(terms) if attrs.get(s) is None else graph.constant(np.float32(attrs[s])) for s in SIDES]
        return graph.node("Where", export_truth(graph, inputs[0]), *sides)


class MaskedFill(Where):
    """``masked_fill(x, mask, value)``; the Program op is ``where``."""

    name = "masked_fill"
    functions = (torch.masked_fill,)
    methods = ("masked_fill", "masked_fill_")

    def trace(self, call: Call) -> Any:
        found = call.bind("input", "mask", "value")
        x = found.get("input")
        if not isinstance(x, Ref | Tensor):
            raise call.refuse("masked_fill of something that is no tensor", "Use a tensor")
        return self.select(call, found.get("mask"), found.get("value"), x)


def code(value: float, out: QType) -> int:
    """Code of a number, section 4: infinities and what is out of range clamp."""
    lo, hi = out.limits
    if math.isinf(value):
        return lo if value < 0 else hi
    return max(lo, min(hi, round(value / (out.scale or 1.0))))
