"""Where the largest elements are: argmax, argmin, topk, sort, argsort, and max and min along an axis."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from qatlib.ops.base import Attrs, Call, Cost, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.composite import Composite
from qatlib.ops.index import static_axis
from qatlib.ops.region import Regions, over_kept
from qatlib.ops.shape import computed
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering

Found = namedtuple("Found", "values indices")
"""What torch calls ``torch.return_types``; a Program whose outputs are nested in it can be saved."""
_register_namedtuple(Found, serialized_type_name="qatlib.Found")


def _keywords(call: Call) -> Call:
    """``call`` with NumPy's names of the axis as torch's."""
    names = {"axis": "dim", "keepdims": "keepdim"}
    return Call(call.where, call.args, {names.get(key, key): value for key, value in call.kwargs.items()})


class _Positions(Operator):
    """int32 positions along attribute ``axis``."""

    form = "reduction"

    def lower(self, low: Lowering) -> None:
        low.emit(self.name, dict(low.attrs))

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        return 0, op.attrs["size"] - 1

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        return lambda x: self.forward(op.attrs, {}, x).double()

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        dtype = "float64" if graph.qtype(op.inputs[0]).dtype == "int32" else "float32"
        graph.write(op.output, self.export_float(op.attrs, [graph.read(op.inputs[0], dtype)], {}, graph))

    def regions(self, op: Op, program: Program) -> Regions:
        return over_kept(op, program, [op.attrs["axis"]], op.attrs.get("keepdim", True))

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        return Cost(0, program.in_values(op)[0].elements(), 0, base.input_bytes, base.output_bytes)


class _ArgExtreme(_Positions):
    """Attributes ``axis``, ``keepdim``; the lowest position of equal elements, as torch has it."""

    onnx: ClassVar[str]

    def trace(self, call: Call) -> Traced:
        found = _keywords(call).bind("input", "dim", "keepdim", dim=None, keepdim=False)
        x = computed(call, found["input"], self.name)
        return Traced((x,), extreme_attrs(call, x, found["dim"], found["keepdim"]))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        find = torch.argmax if self.name == "argmax" else torch.argmin
        return find(inputs[0], attrs["axis"], attrs["keepdim"])

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node(self.onnx, inputs[0], axis=attrs["axis"], keepdims=int(attrs["keepdim"]))


def extreme_attrs(call: Call, x: Ref, dim: Any, keepdim: bool) -> dict[str, Any]:
    if dim is None:
        raise call.refuse("searches all axes, the batch among them", "Name the axis: dim=1")
    axis = static_axis(call, x, dim, "searches")
    return {"axis": axis, "keepdim": bool(keepdim), "size": x.shape[axis]}


class ArgMax(_ArgExtreme):
    name = "argmax"
    functions = (torch.argmax,)
    methods = ("argmax",)
    onnx = "ArgMax"


class ArgMin(_ArgExtreme):
    name = "argmin"
    functions = (torch.argmin,)
    methods = ("argmin",)
    onnx = "ArgMin"


class Extremes(Composite):
    """``x.max(dim)``: ``.values`` = amax, ``.indices`` = argmax. ``torch.max(x, y)``: ``.maximum``. Likewise min."""

    name = "extremes"
    functions = (torch.max, torch.min)
    methods = ("max", "min")

    def trace(self, call: Call) -> Any:
        largest = call.function in (torch.max, "max")
        found = _keywords(call).bind("input", "dim", "keepdim", dim=None, keepdim=False, other=None)
        x, dim = computed(call, found["input"], "max" if largest else "min"), found["dim"]
        other = found["other"] if dim is None else dim
        if isinstance(other, Ref | Tensor):
            name = "maximum" if largest else "minimum"
            return call.emit(name, [x, call.ref(other)], suffix=f".{name}")
        attrs = extreme_attrs(call, x, dim, found["keepdim"])
        reduction = {"axes": [attrs["axis"]], "keepdim": attrs["keepdim"]}
        values = call.emit("amax" if largest else "amin", [x], reduction, suffix=".values")
        return Found(values, call.emit("argmax" if largest else "argmin", [x], attrs, suffix=".indices"))


class TopK(_Positions):
    """Positions of the ``k`` largest or smallest elements in order; of equal elements the lower position first.

    topk and sort: ``.indices``, then ``.values`` = gather. argsort is the positions alone. torch leaves the order of
    equal elements open unless it is asked for a stable sort.
    """

    name = "topk"
    functions = (torch.topk, torch.sort, torch.argsort)
    methods = ("topk", "sort", "argsort")

    def trace(self, call: Call) -> Any:
        name = call.function if isinstance(call.function, str) else call.function.__name__
        if name == "topk":
            found = call.bind("input", "k", "dim", "largest", dim=-1, largest=True)
            k, largest = found["k"], found["largest"]
        else:
            found = call.bind("input", "dim", "descending", dim=-1, descending=False)
            k, largest = None, found["descending"]
        x = computed(call, found["input"], name)
        axis = static_axis(call, x, found["dim"], "sorts")
        size = x.shape[axis]
        if k is not None and not isinstance(k, int):
            raise call.refuse("takes as many elements as the input says", "Pass k as a number")
        attrs = {"axis": axis, "k": size if k is None else k, "largest": bool(largest), "size": size}
        if name == "argsort":
            return Traced((x,), attrs)
        indices = call.emit("topk", [x], attrs, suffix=".indices")
        return Found(call.emit("gather", [x, indices], {"axis": axis}, suffix=".values"), indices)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        order = torch.sort(inputs[0], dim=attrs["axis"], descending=attrs["largest"], stable=True).indices
        return order.narrow(attrs["axis"], 0, attrs["k"])

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        k = graph.constant(np.array([attrs["k"]], np.int64))
        settings = {"axis": attrs["axis"], "largest": int(attrs["largest"]), "sorted": 1}
        return graph.node_outputs("TopK", inputs[0], k, count=2, **settings)[1]
