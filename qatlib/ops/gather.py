"""Elements at positions that the network computes or is given: gather and embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import ProgramError
from qatlib.ops.base import Attrs, Call, Cost, Kernel, Params, Range, Ref, Traced
from qatlib.ops.index import static_axis
from qatlib.ops.region import Need, Part, Regions, image_axes
from qatlib.ops.shape import Movement, computed, expand_to
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph


def check_positions(index: Tensor, size: int, name: str, what: str) -> Tensor:
    """``index`` as int64; raises ProgramError (QAT207) for a position outside [0, size) of ``what``.

    ``name`` is the value that holds the index.
    """
    index = index.long()
    outside = (index < 0) | (index >= size)
    if bool(outside.any()):
        at = outside.nonzero()[0].tolist()
        raise ProgramError(
            "QAT207",
            name,
            f"holds {int(index[tuple(at)])} at {at}, and {int(outside.sum())} of {index.numel()} elements lie outside"
            f" the {size} positions of {what}",
            f"Give 0 to {size - 1}",
        )
    return index


class Gather(Movement):
    """``x`` at positions of one axis that a second, integer input names. Attribute ``axis``."""

    name = "gather"
    functions = (torch.gather, torch.take_along_dim)
    methods = ("gather", "take_along_dim")

    def trace(self, call: Call) -> Traced:
        along = call.function in (torch.take_along_dim, "take_along_dim")
        names = ("indices", "dim") if along else ("dim", "index")
        found = call.bind("input", *names, dim=None)
        x, index, dim = call.ref(found["input"]), call.ref(found[names[0] if along else "index"]), found["dim"]
        if index.content != "int":
            raise call.refuse("gathers at positions that are no integers", "Pass indices of dtype int64")
        if dim is None:
            raise call.refuse("gathers from all axes at once", "Name dim")
        axis = static_axis(call, x, dim, "gathers from")
        if along:
            shape = list(call.out_shape)
            shape[axis] = x.shape[axis]
            x = self._spread(call, x, shape, index)
        return Traced((x, self._spread(call, index, call.out_shape, x)), {"axis": axis})

    @staticmethod
    def _spread(call: Call, ref: Ref, shape: Sequence[int], like: Ref) -> Ref:
        spread = expand_to(call, ref, shape, like)
        assert isinstance(spread, Ref)
        return spread

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0].gather(attrs["axis"], inputs[1].long())

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        axis, index = op.attrs["axis"], op.inputs[1]
        size = program.in_values(op)[0].shape[axis]
        if ranges[1][0] >= 0 and ranges[1][1] < size:
            return lambda x, i: x.gather(axis, i.long())
        what = f"axis {axis} of {op.inputs[0]!r}"
        return lambda x, i: x.gather(axis, check_positions(i, size, index, what))

    def regions(self, op: Op, program: Program) -> Regions:
        axis, size = op.attrs["axis"], program.in_values(op)[0].shape[op.attrs["axis"]]
        return Regions(
            image_axes(program.values[op.output]),
            lambda box: Part((Need((*box[:axis], (0, size), *box[axis + 1 :])), Need(box))),
        )

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        x, index = op.inputs[0], graph.read(op.inputs[1], "int32")
        graph.node("GatherElements", x, index, output=op.output, axis=op.attrs["axis"])

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node("GatherElements", inputs[0], graph.cast(inputs[1], "int64"), axis=attrs["axis"])


class Embedding(Movement):
    """Rows of a table at integer ids. ``padding_idx`` means nothing at inference."""

    name = "embedding"
    modules = (nn.Embedding,)
    functions = (F.embedding,)

    def trace(self, call: Call) -> Any:
        names = ("weight", "padding_idx", "max_norm")
        found = call.bind("input", *names, max_norm=None)
        if call.module is not None:
            found |= {name: getattr(call.module, name) for name in names}
        ids, table = computed(call, found["input"], "embedding"), call.ref(found["weight"])
        if found["max_norm"] is not None:
            raise call.refuse("an embedding with max_norm, which rescales its table", "Set max_norm=None")
        if any(size < 0 for size in table.shape):
            raise call.refuse("an embedding whose table depends on the sample", "Use torch.gather")
        if ids.content != "int":
            raise call.refuse("an embedding of ids that are no integers", "Pass ids of dtype int64")
        return Traced((table, ids))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        table, ids = inputs
        return table.index_select(0, ids.long().reshape(-1)).reshape(*ids.shape, *table.shape[1:])

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        table, ids = op.inputs
        count = program.in_values(op)[0].shape[0]

        def run(codes: Tensor, i: Tensor) -> Tensor:
            return self.forward({}, {}, codes, check_positions(i, count, ids, f"the table {table!r}"))

        return run

    def regions(self, op: Op, program: Program) -> Regions:
        table, ids = program.in_values(op)
        count = len(ids.shape)
        return Regions(
            image_axes(program.values[op.output]),
            lambda box: Part((Need(((0, table.shape[0]), *box[count:])), Need(box[:count]))),
        )

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        graph.node("Gather", op.inputs[0], graph.read(op.inputs[1], "int32"), output=op.output, axis=0)

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node("Gather", inputs[0], graph.cast(inputs[1], "int64"), axis=0)

    def cost(self, op: Op, program: Program) -> Cost:
        """Only the rows that the ids name are read."""
        out, ids = program.values[op.output], program.in_values(op)[1]
        return Cost(0, out.elements(), 0, ids.bytes() + out.bytes(), out.bytes())
