"""Casts: float types are one format, truth values are the numbers 0 and 1, integers get a scale when they turn real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatlib.errors import QConfigError
from qatlib.ops.base import Attrs, Call, Content, Format, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.boundary import quantize
from qatlib.ops.elementwise import content_of
from qatlib.ops.region import Regions, pointwise
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering

_CONTENTS: dict[str, Content] = {
    **dict.fromkeys(("float", "half", "bfloat16", "double"), "float"),
    **dict.fromkeys(("int", "long", "short", "char", "byte"), "int"),
    "bool": "bool",
}
_PLACES = ("cpu", "cuda")


class Cast(Operator):
    """Attribute ``to``: "float" (of truth values or integers) or "int" (of truth values)."""

    name = "cast"
    methods = ("to", "type", "type_as", *_CONTENTS, *_PLACES)

    def trace(self, call: Call) -> Any:
        x = call.args[0] if call.args else call.kwargs.get("self")
        to = self._target(call, x)
        if isinstance(x, Tensor):
            return x.to({"float": torch.float32, "int": torch.int64, "bool": torch.bool}[to])
        if not isinstance(x, Ref):
            raise call.refuse("a cast of something that is no tensor", "Cast tensors")
        if to == x.content:
            return x
        if to == "bool":
            return Traced((x, call.ref(torch.tensor(0))), {"function": "ne"}, op="compare")
        if to == "int" and x.content == "float":
            raise call.refuse("real numbers cast to integers", "Run it after the outputs")
        return Traced((x,), {"to": to}, format=Format("int8", 1.0) if x.content == "bool" and to == "float" else None)

    @staticmethod
    def _target(call: Call, x: Any) -> Content:
        """What the result holds: as the dtype or other tensor among the arguments says, else as before."""
        if call.function in _CONTENTS:
            return _CONTENTS[call.function]
        for value in (*call.args[1:], *call.kwargs.values()):
            if isinstance(value, Ref | Tensor):
                return content_of(value)
            if isinstance(value, torch.dtype):
                return content_of(torch.empty(0, dtype=value))
        if call.function == "type":
            raise call.refuse("type() without a torch.dtype", "Use .to(dtype)")
        return content_of(x)

    def check_formats(self, node: str, inputs: Sequence[str], output: str) -> None:
        if output == "float32" or inputs[0] not in ("int8", "int32"):
            raise QConfigError("QAT148", node, f"a cast from {inputs[0]} to {output}", "Use int8 or int16 behind it")

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0].float() if attrs["to"] == "float" else inputs[0].long()

    def lower(self, low: Lowering) -> None:
        lo, hi = low.out.limits
        low.emit("cast", {"lo": lo, "hi": hi})

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        scale = program.values[op.output].qtype.scale
        if scale is None:
            return lambda x: x.double()
        return lambda x: quantize(x.float(), scale, op.attrs["lo"], op.attrs["hi"])

    def regions(self, op: Op, program: Program) -> Regions:
        return pointwise(op, program)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        qtype = program.values[op.output].qtype
        if qtype.scale is None:
            graph.write(op.output, op.inputs[0])
            return
        codes = graph.quantize(graph.read(op.inputs[0], "float32"), qtype)
        lo, hi = op.attrs["lo"], op.attrs["hi"]
        graph.write(op.output, codes if (lo, hi) == qtype.limits else graph.clip(codes, lo, hi, dtype="float32"))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.cast(inputs[0], "float32" if attrs.get("to", "float") == "float" else "int64")
