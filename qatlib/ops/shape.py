"""Operators that move bits and change none: reshape, permute and expand, and the shuffles made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.base import Attrs, Call, Cost, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.composite import Composite
from qatlib.ops.region import Box, Need, Part, Regions, broadcast, image_axes
from qatlib.ops.work import Form
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.lowering import Lowering

Step = tuple[str, dict[str, Any]]
"""Name and attributes of an operator with one input."""


def computed(call: Call, x: Any, what: str) -> Ref:
    """``x`` if the graph computes it; raises GraphError (QAT134) for a constant."""
    if not isinstance(x, Ref):
        raise call.refuse(f"{what} of a constant", f"Compute the {what} once, in __init__")
    return x


def finish(call: Call, own: str, x: Ref, steps: Sequence[Step]) -> Traced | Ref:
    """``steps`` one after the other, named after their operators; a last one of operator ``own`` is the call itself."""
    for place, (op, attrs) in enumerate(steps, start=1):
        if place == len(steps) and op == own:
            return Traced((x,), attrs)
        x = call.emit(op, [x], attrs, suffix=f".{op}")
    return x


def reshape_to(sizes: Sequence[int]) -> Step:
    """The step that gives the shape ``sizes``, in which one size may be negative."""
    return "reshape", {"shape": [max(size, -1) for size in sizes]}


class Movement(Operator):
    """Bits are moved, format and content stay: the integer kernel is the float function, with the same attributes."""

    keeps_scale = True
    form: ClassVar[Form] = "copy"
    onnx: ClassVar[str]

    def lower(self, low: Lowering) -> None:
        low.emit(self.name, dict(low.attrs))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        return lambda *inputs: self.forward(op.attrs, {}, *inputs)


class Reshape(Movement):
    """The target shape is that of the traced output, so ``view(x.size(0), -1)`` and ``flatten(1)`` are the same."""

    name = "reshape"
    form = "view"
    modules = (nn.Flatten, nn.Unflatten)
    functions = (torch.flatten, torch.ravel, torch.reshape, torch.squeeze, torch.unflatten, torch.unsqueeze)
    methods = (
        "flatten", "ravel", "reshape", "reshape_as", "squeeze", "squeeze_", "unflatten", "unsqueeze", "unsqueeze_",
        "view", "view_as",
    )  # fmt: skip

    def trace(self, call: Call) -> Traced:
        x = computed(call, call.bind("input")["input"], "reshape")
        if any(isinstance(value, torch.dtype) for value in (*call.args[1:], *call.kwargs.values())):
            raise call.refuse("reads the bits of a tensor as another dtype", "Convert with .to(dtype)")
        if sum(size < 0 for size in call.out_shape) > 1:
            raise call.refuse("the batch size appears in two axes of the result", "Keep the batch in one axis")
        return Traced((x,), reshape_to(call.out_shape)[1])

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(attrs["shape"])

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        graph.move(op, "Reshape", graph.constant(np.array(op.attrs["shape"], np.int64)))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.reshape(inputs[0], attrs["shape"])

    def cost(self, op: Op, program: Program) -> Cost:
        return Cost()


class Permute(Movement):
    name = "permute"
    functions = (
        torch.permute, torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim, torch.moveaxis, torch.t,
        torch.adjoint, getattr,
    )  # fmt: skip
    methods = (
        "permute", "transpose", "transpose_", "swapaxes", "swapaxes_", "swapdims", "swapdims_", "movedim", "moveaxis",
        "t", "t_", "adjoint",
    )  # fmt: skip

    def trace(self, call: Call) -> Traced:
        rest = dict(call.kwargs)
        x = computed(call, call.args[0] if call.args else rest.pop("input", rest.pop("self", None)), "permute")
        if call.function is getattr and call.args[1] not in ("T", "mT", "H", "mH"):
            raise call.refuse(f"attribute {call.args[1]!r} of a tensor", "Use tensor operations")
        probe = torch.empty([axis + 2 for axis in range(len(x.shape))], device="meta")
        name = call.function.rstrip("_") if isinstance(call.function, str) else ""
        moved = (getattr(probe, name) if name else call.function)(*([] if name else [probe]), *call.args[1:], **rest)
        return Traced((x,), {"dims": [size - 2 for size in moved.shape]})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0].permute(attrs["dims"])

    def regions(self, op: Op, program: Program) -> Regions:
        dims = op.attrs["dims"]

        def part(box: Box) -> Part:
            spans = dict(zip(dims, box, strict=True))
            return Part((Need(tuple(spans[axis] for axis in range(len(dims)))),))

        return Regions(image_axes(program.values[op.output]), part)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        graph.move(op, "Transpose", perm=op.attrs["dims"])

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node("Transpose", inputs[0], perm=attrs["dims"])


# -- broadcasting ------------------------------------------------------------------------------------------------------


class Expand(Movement):
    """Broadcast to ``shape``, in which -k is k times the batch; see :func:`expand_to` for ``batch``."""

    name = "expand"
    functions = (torch.broadcast_to,)
    methods = ("expand", "expand_as", "broadcast_to")

    def trace(self, call: Call) -> Traced | Ref:
        found = call.bind("input", "other")
        x, other = call.ref(found["input"]), found.get("other")
        like = [other] if isinstance(other, Ref) else []
        return expand_to(call, x, call.out_shape, *like, own=True)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        batch = 1
        if attrs["batch"] is not None:
            source, axis, times = attrs["batch"]
            batch = inputs[source].shape[axis] // times
        return inputs[0].expand([-size * batch if size < 0 else size for size in attrs["shape"]])

    def regions(self, op: Op, program: Program) -> Regions:
        out, (x, *like) = program.values[op.output], program.in_values(op)

        def part(box: Box) -> Part:
            sizes = [size if size < 0 else stop - start for size, (start, stop) in zip(out.shape, box, strict=True)]
            corners = [
                Need(tuple((0, n if size < 0 else 1) for n, size in zip(v.sizes(), v.shape, strict=True))) for v in like
            ]
            return Part((Need(broadcast(box, out, x)), *corners), {**op.attrs, "shape": sizes}, key=tuple(sizes))

        return Regions(image_axes(out), part)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        graph.node("Expand", op.inputs[0], self._onnx_shape(graph, op.attrs, op.inputs), output=op.output)

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node("Expand", inputs[0], self._onnx_shape(graph, attrs, inputs))

    @staticmethod
    def _onnx_shape(graph: Graph, attrs: Attrs, inputs: Sequence[str]) -> str:
        shape = np.array(attrs["shape"], np.int64)
        if attrs["batch"] is None:
            return graph.constant(shape)
        source, axis, times = attrs["batch"]
        size = graph.node("Shape", inputs[source], start=axis, end=axis + 1)
        batch = graph.node("Div", size, graph.constant(np.array([times], np.int64)))
        scaled = graph.node("Mul", batch, graph.constant(np.where(shape < 0, -shape, 0)))
        return graph.node("Add", scaled, graph.constant(np.where(shape < 0, 0, shape)))


def expand_to(call: Call, x: Ref, shape: Sequence[int], *like: Ref, own: bool = False) -> Traced | Ref:
    """``x`` broadcast to ``shape``; the batch size is that of x, else that of ``like``.

    ``own`` makes the step the call itself; else its name ends in ``.expand``. Raises GraphError (QAT134) where nothing
    tells the batch size.
    """
    if tuple(shape) == x.shape:
        return x
    batch = None
    inputs: list[Ref] = [x]
    if any(size < 0 for size in shape):
        source = next((ref for ref in (x, *like) if any(size < 0 for size in ref.shape)), None)
        if source is None:
            raise call.refuse("repeats a constant to the batch size", "Add or join it as it is: it is repeated there")
        axis = next(axis for axis, size in enumerate(source.shape) if size < 0)
        if source is not x:
            inputs.append(source)
        batch = [len(inputs) - 1, axis, -source.shape[axis]]
    attrs = {"shape": list(shape), "batch": batch}
    return Traced(tuple(inputs), attrs) if own else call.emit("expand", inputs, attrs, suffix=".expand")


# -- made of reshape and permute ---------------------------------------------------------------------------------------


class Shuffle(Composite):
    """pixel_shuffle, pixel_unshuffle and channel_shuffle: ``.reshape .permute .reshape#1``."""

    name = "shuffle"
    modules = (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
    functions = (F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle)

    def trace(self, call: Call) -> Traced | Ref:
        names = ("upscale_factor", "downscale_factor", "groups")
        found = call.bind("input", "factor")
        x = computed(call, found["input"], "shuffle")
        owner = vars(call.module) if call.module is not None else call.kwargs
        factor = int(next((owner[name] for name in names if name in owner), found.get("factor")) or 1)
        kind = type(call.module).__name__ if call.module is not None else call.function.__name__
        split, order = self._plan(kind.lower().replace("_", ""), x.shape, factor)
        steps = [reshape_to(split), ("permute", {"dims": order}), reshape_to(call.out_shape)]
        return finish(call, self.name, x, steps)

    @staticmethod
    def _plan(kind: str, shape: Sequence[int], factor: int) -> tuple[list[int], list[int]]:
        """Sizes to split into, and the order in which the parts come back together."""
        if kind == "channelshuffle":
            batch, channels, *rest = shape
            tail = list(range(3, 3 + len(rest)))
            return [batch, factor, channels // factor, *rest], [0, 2, 1, *tail]
        *lead, channels, height, width = shape
        n = len(lead)
        if kind == "pixelshuffle":
            split = [*lead, channels // factor**2, factor, factor, height, width]
            return split, [*range(n), n, n + 3, n + 1, n + 4, n + 2]
        split = [*lead, channels, height // factor, factor, width // factor, factor]
        return split, [*range(n), n, n + 2, n + 4, n + 1, n + 3]
