"""Padding and cropping: constant, reflect, replicate and circular."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.integer import pad
from qatlib.ops.base import Attrs, Call, Params, Range, Ref, Traced
from qatlib.ops.region import Box, Need, Part, Regions, image_axes, without
from qatlib.ops.shape import Movement, computed
from qatlib.program import Op, Program, Value

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering

_MODES = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}


def pad_steps(call: Call, x: Ref, pads: Sequence[Sequence[int]], mode: str = "constant", value: float = 0) -> Ref:
    """``x`` padded by (before, after) pairs of its last axes, in the order of the axes, as a step ``.pad``.

    ``mode`` is constant, reflect, replicate or circular. Nothing to pad makes no step. Raises GraphError (QAT134) for
    the batch axis.
    """
    attrs = _checked(call, x, pads, mode, value)
    return call.emit("pad", [x], attrs, suffix=".pad") if attrs else x


def _checked(call: Call, x: Ref, pads: Sequence[Sequence[int]], mode: str, value: float) -> dict[str, Any]:
    """Attributes of the node; empty where nothing is padded."""
    padding = [[0, 0] for _ in range(len(x.shape) - len(pads))] + [[int(a), int(b)] for a, b in pads]
    if any(any(pair) and size < 0 for pair, size in zip(padding, x.shape, strict=True)):
        raise call.refuse("pads the batch axis", "Pad another axis")
    if not any(size for pair in padding for size in pair):
        return {}
    return {"padding": padding, "mode": mode, "value": value}


class Pad(Movement):
    """Attributes: ``padding``, (before, after) of every axis, negative to crop; ``mode``; ``value``, a real number."""

    name = "pad"
    modules = tuple(
        getattr(nn, f"{kind}Pad{axes}d")
        for kind in ("Constant", "Zero", "Reflection", "Replication", "Circular")
        for axes in (1, 2, 3)
    )
    functions = (F.pad,)

    def trace(self, call: Call) -> Traced | Ref:
        found = call.bind("input", "pad", "mode", "value", mode="constant", value=None)
        if call.module is not None:
            kind = next(base.__name__ for base in type(call.module).__mro__ if base in self.modules)
            found["pad"] = call.module.padding
            found["mode"] = next((mode for name, mode in _MODES.items() if kind.startswith(name)), "constant")
            found["value"] = getattr(call.module, "value", None)
        x = computed(call, found["input"], "pad")
        sizes = [int(size) for size in found["pad"]]
        pairs = list(zip(sizes[::2], sizes[1::2], strict=True))[::-1]
        value = found["value"] if found["value"] is not None and found["mode"] == "constant" else 0
        if isinstance(value, Ref | Tensor):
            raise call.refuse("pads with a tensor", "Pad with a number")
        attrs = _checked(call, x, pairs, found["mode"], value)
        return Traced((x,), attrs) if attrs else x

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        if attrs["mode"] == "constant":
            return pad(x, attrs["padding"], attrs["value"])
        for axis, (pair, size) in enumerate(zip(attrs["padding"], x.shape, strict=True)):
            if any(pair):
                x = x.index_select(axis, torch.tensor(sources(size, pair, attrs["mode"]), device=x.device))
        return x

    def rounds(self, attrs: Attrs) -> bool:
        return bool(attrs["mode"] == "constant" and attrs["value"] != 0)

    def real_range(self, attrs: Attrs, low: float, high: float) -> tuple[float, float]:
        filled = float(attrs["value"]) if attrs["mode"] == "constant" else low
        return min(low, filled), max(high, filled)

    def lower(self, low: Lowering) -> None:
        value, scale = low.attrs["value"], low.out.scale
        lo, hi = low.out.limits
        if scale is not None:
            value = min(max(value / scale, lo), hi)
        low.emit(self.name, {**low.attrs, "value": round(value)})

    def out_range(self, op: Op, value: Value, ranges: Sequence[Range]) -> Range:
        (lo, hi), filled = ranges[0], op.attrs["value"]
        return (min(lo, filled), max(hi, filled)) if op.attrs["mode"] == "constant" else (lo, hi)

    def regions(self, op: Op, program: Program) -> Regions:
        """Copies of elements of the input are made of whole axes."""
        axes, pairs = image_axes(program.values[op.output]), op.attrs["padding"]
        if op.attrs["mode"] != "constant":
            padded, sizes = [axis for axis, pair in enumerate(pairs) if any(pair)], program.in_values(op)[0].sizes()
            return Regions(
                without(axes, padded),
                lambda box: Part((Need(tuple((0, n) if i in padded else box[i] for i, n in enumerate(sizes))),)),
            )
        attrs = {**op.attrs, "padding": [[0, 0] for _ in pairs]}

        def part(box: Box) -> Part:
            reads = tuple(
                (start - before, stop - before) for (start, stop), (before, _) in zip(box, pairs, strict=True)
            )
            return Part((Need(reads, op.attrs["value"]),), attrs, key=())

        return Regions(axes, part)

    # -- ONNX ----------------------------------------------------------------------------------------------------

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        dtype = "int32" if graph.qtype(op.output).dtype == "int16" else graph.qtype(op.output).dtype
        x = graph.read(op.inputs[0], dtype)
        sizes = program.in_values(op)[0].shape
        graph.write(op.output, self._onnx(graph, op.attrs, x, sizes, np.array(op.attrs["value"], dtype)))

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        (x,) = program.in_values(op)
        value = op.attrs["value"] * (1 if x.qtype.scale is None else x.qtype.scale)
        return {**op.attrs, "value": value, "sizes": list(x.shape)}, {}

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return self._onnx(graph, attrs, inputs[0], attrs.get("sizes"), np.float32(attrs["value"]))

    @staticmethod
    def _onnx(graph: Graph, attrs: Attrs, x: str, sizes: Sequence[int] | None, value: Any) -> str:
        before, after = (np.array(side, np.int64) for side in zip(*attrs["padding"], strict=True))
        if attrs["mode"] == "constant":
            crop = graph.constant(np.maximum(-before, 0)), _stops(graph, after)
            if (before < 0).any() or (after < 0).any():
                x = graph.node("Slice", x, *crop)
            pads = np.maximum(np.concatenate([before, after]), 0)
            return graph.node("Pad", x, graph.constant(pads), graph.constant(value)) if pads.any() else x
        if sizes is None:
            # A float island does not know its sizes; ONNX has the modes under other names.
            mode = {"replicate": "edge", "circular": "wrap"}.get(attrs["mode"], attrs["mode"])
            return graph.node("Pad", x, graph.constant(np.concatenate([before, after])), mode=mode)
        for axis, pair in enumerate(attrs["padding"]):
            if any(pair):
                index = np.array(sources(sizes[axis], pair, attrs["mode"]), np.int64)
                x = graph.node("Gather", x, graph.constant(index), axis=axis)
        return x


def _stops(graph: Graph, after: np.ndarray[Any, Any]) -> str:
    """Ends of ONNX slices that leave out ``-after`` elements of each axis."""
    return graph.constant(np.where(after < 0, after, np.iinfo(np.int64).max))


def sources(size: int, pair: Sequence[int], mode: str) -> list[int]:
    """Position that every element of a padded axis is read from: section 4 of ``docs/numerics.md``."""
    reads = range(-pair[0], size + pair[1])
    if mode == "reflect":
        return [-q if q < 0 else 2 * (size - 1) - q if q >= size else q for q in reads]
    if mode == "replicate":
        return [min(max(q, 0), size - 1) for q in reads]
    return [q % size for q in reads]
