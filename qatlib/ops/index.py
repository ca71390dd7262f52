"""Parts of a tensor at positions known before the run: slices, splits, index lists, flips, rolls, repetitions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.base import Attrs, Call, Params, Ref, Traced
from qatlib.ops.composite import Composite
from qatlib.ops.conv import spread
from qatlib.ops.pad import pad_steps
from qatlib.ops.region import Box, Need, Part, Regions, drawn, image_axes, window_span
from qatlib.ops.shape import Movement, Step, computed, finish, reshape_to
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph

Cut = tuple[int, int, int]
"""Start, stop and step along one axis."""


def static_axis(call: Call, x: Ref, dim: Any, what: str) -> int:
    """``dim`` counted from the front; raises GraphError (QAT134) for the batch axis."""
    axis = int(dim) % len(x.shape)
    if x.shape[axis] < 0:
        raise call.refuse(f"{what} the batch axis, so one sample would depend on the others", "Use another axis")
    return axis


def slice_step(cuts: Mapping[int, Cut]) -> Step:
    """The step that takes ``cuts`` along the axes that are its keys."""
    axes = sorted(cuts)
    lists = (list(part) for part in zip(*(cuts[axis] for axis in axes), strict=True))
    return "slice", {"axes": axes, **dict(zip(("starts", "stops", "steps"), lists, strict=True))}


# -- x[...] ------------------------------------------------------------------------------------------------------------


class Slice(Movement):
    """Evenly spaced positions of some axes; every form of ``x[...]`` begins here.

    Integers and None add a ``.reshape`` behind the slice, index lists a ``.take``.
    """

    name = "slice"
    functions = (operator.getitem, torch.narrow, torch.select)
    methods = ("narrow", "select")

    def trace(self, call: Call) -> Any:
        if call.function is operator.getitem:
            return self._getitem(call)
        narrow = call.function in (torch.narrow, "narrow")
        found = call.bind("input", "dim", "start" if narrow else "index", "length")
        x = computed(call, found["input"], "slice")
        axis = static_axis(call, x, found["dim"], "cuts")
        start = found["start" if narrow else "index"]
        if not isinstance(start, int):
            raise call.refuse("cuts at a position computed from the input", "Use torch.gather")
        start %= x.shape[axis]
        key = slice(start, start + found["length"]) if narrow else start
        return self._take_apart(call, x, [slice(None)] * axis + [key])

    def _getitem(self, call: Call) -> Any:
        x, key = call.args
        keys = list(key) if isinstance(key, tuple) else [key]
        if isinstance(x, Tensor | Ref) and len(keys) == 1 and isinstance(keys[0], Ref) and keys[0].content == "int":
            return rows(call, x, keys[0])
        x = computed(call, x, "slice")
        if any(isinstance(k, Ref) for k in keys):
            raise call.refuse(
                "is indexed by a tensor computed from the input", "Use torch.gather or torch.take_along_dim"
            )
        if any(isinstance(k, bool) for k in keys):
            raise call.refuse("is indexed by True or False", "Use None for a new axis")
        return self._take_apart(call, x, keys)

    def _take_apart(self, call: Call, x: Ref, keys: Sequence[Any]) -> Any:
        """What ``x[keys]`` is made of."""
        cuts: dict[int, Cut] = {}
        sizes: list[int] = []
        lists: dict[int, Tensor] = {}
        reshaped, axis = False, 0
        for key in full_keys(keys, len(x.shape)):
            if key is None:
                sizes.append(1)
                reshaped = True
                continue
            size = x.shape[axis]
            if isinstance(key, slice):
                cut = self.cut(call, size, key)
                if cut is not None:
                    cuts[axis] = cut
                    size = len(range(*cut))
                sizes.append(size)
            elif isinstance(key, int) or (isinstance(key, Tensor) and key.dim() == 0):
                at = int(key) % x.shape[static_axis(call, x, axis, "takes one element of")]
                cuts[axis] = (at, at + 1, 1)
                reshaped = True
            else:
                for part in _positions(key):
                    static_axis(call, x, axis, "takes elements of")
                    lists[len(sizes)] = torch.where(part < 0, part + x.shape[axis], part)
                    sizes.append(x.shape[axis])
                    axis += 1
                continue
            axis += 1
        steps = [slice_step(cuts)] if cuts else []
        if reshaped:
            steps.append(reshape_to(sizes))
        return finish(call, self.name, x, [*steps, *_listed(sizes, lists)])

    @staticmethod
    def cut(call: Call, size: int, key: slice) -> Cut | None:
        """The positions of a slice; None for all of them."""
        parts = (key.start, key.stop, key.step)
        if not all(part is None or isinstance(part, int) for part in parts):
            raise call.refuse("is cut at a position computed from the input", "Use torch.gather")
        if size < 0:
            # The tracer refuses results whose batch axis is no multiple of the batch: a stop below 0 is the batch.
            if key.start in (None, 0) and key.step in (None, 1) and (key.stop is None or key.stop < 0):
                return None
            raise call.refuse("cuts the batch axis, so one sample would depend on the others", "Use another axis")
        start, stop, step = key.indices(size)
        if stop <= start:
            raise call.refuse("is an empty slice", "Leave it out")
        return None if (start, stop, step) == (0, size, 1) else (start, stop, step)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        key = [slice(None)] * inputs[0].dim()
        for axis, *cut in zip(*(attrs[name] for name in ("axes", "starts", "stops", "steps")), strict=True):
            key[axis] = slice(*cut)
        return inputs[0][tuple(key)]

    def regions(self, op: Op, program: Program) -> Regions:
        cuts = dict(zip(op.attrs["axes"], zip(op.attrs["starts"], op.attrs["steps"], strict=True), strict=True))

        def part(box: Box) -> Part:
            reads = [
                window_span(span, 1, step, 1, -start)
                for span, (start, step) in ((span, cuts.get(axis, (0, 1))) for axis, span in enumerate(box))
            ]
            sizes = [stop - start for start, stop in (reads[axis] for axis in cuts)]
            return Part(
                (Need(tuple(reads)),), {**op.attrs, "starts": [0] * len(cuts), "stops": sizes}, key=tuple(sizes)
            )

        return Regions(image_axes(program.values[op.output]), part)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        graph.move(op, "Slice", *_slice_inputs(graph, op.attrs))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node("Slice", inputs[0], *_slice_inputs(graph, attrs))


def _slice_inputs(graph: Graph, attrs: Attrs) -> list[str]:
    return [graph.constant(np.array(attrs[name], np.int64)) for name in ("starts", "stops", "axes", "steps")]


def full_keys(keys: Sequence[Any], axes: int) -> list[Any]:
    """``keys`` with Ellipsis written out, so that every axis has its key."""
    missing = axes - sum(_consumed(key) for key in keys)
    at = next((i for i, key in enumerate(keys) if key is Ellipsis), len(keys))
    return [*keys[:at], *[slice(None)] * missing, *keys[at + 1 :]]


def _consumed(key: Any) -> int:
    """Number of axes that a key stands for."""
    if key is None or key is Ellipsis:
        return 0
    return key.dim() if isinstance(key, Tensor) and key.dtype == torch.bool else 1


def _positions(key: Any) -> tuple[Tensor, ...]:
    """An index list, or the positions of a mask that are true, one list per axis."""
    index = torch.as_tensor(key)
    return index.nonzero(as_tuple=True) if index.dtype == torch.bool else (index.long(),)


def _listed(sizes: Sequence[int], lists: Mapping[int, Tensor]) -> list[Step]:
    """Indexing axes of a tensor of ``sizes`` by index lists that broadcast against each other, as torch defines it.

    The axes become one, from which elements are taken. Where axes between them stay, the result's come first.
    """
    if not lists:
        return []
    axes, steps, left = sorted(lists), list[Step](), list(sizes)
    first, count = axes[0], len(axes)
    if axes != list(range(first, first + count)):
        order = axes + [axis for axis in range(len(left)) if axis not in lists]
        steps.append(("permute", {"dims": order}))
        left, first = [left[axis] for axis in order], 0
    if count > 1:
        steps.append(reshape_to([*left[:first], math.prod(left[first : first + count]), *left[first + count :]]))
    flat = torch.zeros((), dtype=torch.int64)
    for axis in axes:
        flat = flat * sizes[axis] + lists[axis]
    steps.append(("take", {"axis": first, "index": flat.flatten().tolist()}))
    if flat.dim() != 1:
        steps.append(reshape_to([*left[:first], *flat.shape, *left[first + count :]]))
    return steps


def rows(call: Call, table: Tensor | Ref, ids: Ref) -> Ref:
    """``table[ids]`` as a step ``.embedding``; raises GraphError (QAT134) for a table that holds the batch."""
    source = call.ref(table)
    if any(size < 0 for size in source.shape):
        raise call.refuse("takes samples of the batch by computed positions", "Use torch.gather along another axis")
    return call.emit("embedding", [source, ids], suffix=".embedding")


class Split(Composite):
    """split, chunk and the like: one slice per piece, ``.0``, ``.1``, …; unbind drops the axis."""

    name = "split"
    functions = (
        torch.split, torch.chunk, torch.tensor_split, torch.unbind, torch.split_with_sizes, torch.unsafe_split,
        torch.unsafe_chunk,
    )  # fmt: skip
    methods = ("split", "chunk", "tensor_split", "unbind", "split_with_sizes", "unsafe_split", "unsafe_chunk")

    def trace(self, call: Call) -> tuple[Ref, ...]:
        more = dict(call.kwargs)
        args = call.args or (more.pop("input", None) or more.pop("tensor", None) or more.pop("self", None),)
        x = computed(call, args[0], "split")
        name = call.function if isinstance(call.function, str) else call.function.__name__
        unbound = name == "unbind"
        place = 1 if unbound else 2
        dim = more.get("dim", args[place] if len(args) > place else 0)
        axis = static_axis(call, x, dim, "splits")
        probe = torch.empty([abs(size) for size in x.shape], device="meta")
        pieces = getattr(probe, name)(*args[1:], **more)
        stops = np.cumsum([1 if unbound else piece.shape[axis] for piece in pieces]).tolist()
        cuts = zip([0, *stops[:-1]], stops, strict=True)
        return tuple(self._piece(call, x, axis, cut, f".{i}", unbound) for i, cut in enumerate(cuts))

    @staticmethod
    def _piece(call: Call, x: Ref, axis: int, cut: tuple[int, int], suffix: str, unbound: bool) -> Ref:
        if cut[0] == cut[1]:
            raise call.refuse("makes an empty piece", "Split into pieces that hold something")
        op, attrs = slice_step({axis: (*cut, 1)})
        piece = call.emit(op, [x], attrs, suffix=f"{suffix}.slice" if unbound else suffix)
        if not unbound:
            return piece
        op, attrs = reshape_to([*x.shape[:axis], *x.shape[axis + 1 :]])
        return call.emit(op, [piece], attrs, suffix=suffix)


# -- index lists -------------------------------------------------------------------------------------------------------


class Take(Movement):
    """Positions ``index`` of one axis: index_select, flip, roll, repeat, repeat_interleave, tile."""

    name = "take"
    functions = (
        torch.index_select, torch.flip, torch.fliplr, torch.flipud, torch.roll, torch.repeat_interleave, torch.tile,
    )  # fmt: skip
    methods = ("index_select", "flip", "fliplr", "flipud", "roll", "repeat", "repeat_interleave", "tile")

    def trace(self, call: Call) -> Any:
        name = call.function if isinstance(call.function, str) else call.function.__name__
        if name == "index_select":
            return self._select(call)
        more = {key: value for key, value in call.kwargs.items() if key not in ("input", "self")}
        x = computed(call, call.args[0] if call.args else call.bind("input", input=None)["input"], name)
        plan: Callable[..., Any] = getattr(self, f"_{name}")
        return plan(call, x, *call.args[1:], **more)

    def _select(self, call: Call) -> Any:
        found = call.bind("input", "dim", "index")
        x, index = found["input"], found["index"]
        if isinstance(index, Ref):
            if int(found["dim"]) % len(x.shape):
                raise call.refuse("selects computed positions of an inner axis", "Use torch.gather")
            return rows(call, x, index)
        x = computed(call, x, "index_select")
        axis = static_axis(call, x, found["dim"], "takes elements of")
        return self._taken(call, x, {axis: index.flatten().tolist()})

    def _taken(self, call: Call, x: Ref, indices: Mapping[int, Sequence[int]]) -> Traced | Ref:
        """Of every axis in ``indices`` these positions, in one step per axis that changes."""
        steps: list[Step] = []
        for axis, index in sorted(indices.items()):
            if list(index) != list(range(abs(x.shape[axis]))):
                static_axis(call, x, axis, "moves elements of")
                steps.append(("take", {"axis": axis, "index": list(index)}))
        return finish(call, self.name, x, steps)

    def _flip(self, call: Call, x: Ref, *dims: Any) -> Traced | Ref:
        return self._flipped(call, x, _varargs(dims))

    def _fliplr(self, call: Call, x: Ref) -> Traced | Ref:
        return self._flipped(call, x, [1])

    def _flipud(self, call: Call, x: Ref) -> Traced | Ref:
        return self._flipped(call, x, [0])

    def _flipped(self, call: Call, x: Ref, dims: Sequence[int]) -> Traced | Ref:
        axes = [static_axis(call, x, dim, "flips") for dim in dims]
        return self._taken(call, x, {axis: range(x.shape[axis])[::-1] for axis in axes})

    def _roll(self, call: Call, x: Ref, shifts: Any, dims: Any = None) -> Traced | Ref:
        if dims is None or dims == ():
            raise call.refuse("rolls over all axes at once", "Name the axes: torch.roll(x, shifts, dims)")
        pairs = zip(*((part,) if isinstance(part, int) else part for part in (shifts, dims)), strict=True)
        indices: dict[int, list[int]] = {}
        for shift, dim in pairs:
            axis = static_axis(call, x, dim, "rolls")
            size = x.shape[axis]
            before = indices.get(axis, list(range(size)))
            indices[axis] = [before[(i - shift) % size] for i in range(size)]
        return self._taken(call, x, indices)

    def _repeat(self, call: Call, x: Ref, *repeats: Any) -> Traced | Ref:
        return self._tiled(call, x, _varargs(repeats))

    def _tile(self, call: Call, x: Ref, *dims: Any) -> Traced | Ref:
        repeats = _varargs(dims)
        return self._tiled(call, x, [1] * (len(x.shape) - len(repeats)) + repeats)

    def _tiled(self, call: Call, x: Ref, repeats: Sequence[int]) -> Traced | Ref:
        steps: list[Step] = []
        sizes = [*[1] * (len(repeats) - len(x.shape)), *x.shape]
        if len(sizes) > len(x.shape):
            steps.append(reshape_to(sizes))
        for axis, (size, times) in enumerate(zip(sizes, repeats, strict=True)):
            if times < 1 or (times != 1 and size < 0):
                raise call.refuse("repeats along the batch axis, or by the batch size", "Repeat another axis")
            if times != 1:
                steps.append(("take", {"axis": axis, "index": list(range(size)) * times}))
        return finish(call, self.name, x, steps)

    def _repeat_interleave(
        self, call: Call, x: Ref, repeats: Any, dim: Any = None, output_size: int | None = None
    ) -> Traced | Ref:
        if dim is None or isinstance(repeats, Ref):
            raise call.refuse("repeats over all axes, or as often as the input says", "Name dim, and repeat by numbers")
        axis = static_axis(call, x, dim, "repeats")
        index = torch.arange(x.shape[axis]).repeat_interleave(torch.as_tensor(repeats))
        return self._taken(call, x, {axis: index.tolist()})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0].index_select(attrs["axis"], torch.tensor(attrs["index"], device=inputs[0].device))

    def regions(self, op: Op, program: Program) -> Regions:
        axis, index = op.attrs["axis"], op.attrs["index"]

        def part(box: Box) -> Part:
            taken = index[slice(*box[axis])]
            low, high = drawn(taken)
            need = Need((*box[:axis], (low, high), *box[axis + 1 :]))
            return Part((need,), {**op.attrs, "index": [at - low for at in taken]}, key=box[axis])

        return Regions(image_axes(program.values[op.output]), part)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        index = graph.constant(np.array(op.attrs["index"], np.int64))
        graph.move(op, "Gather", index, axis=op.attrs["axis"])

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return graph.node("Gather", inputs[0], graph.constant(np.array(attrs["index"])), axis=attrs["axis"])


def _varargs(values: tuple[Any, ...]) -> list[int]:
    """The numbers of ``f(1, 2)`` and of ``f((1, 2))``."""
    return list(values[0]) if len(values) == 1 and isinstance(values[0], list | tuple) else list(values)


class Unfold(Composite):
    """Windows as axes of their own: ``x.unfold``, and nn.Unfold (im2col), whose columns are patches.

    ``x.unfold``: ``.take .reshape .permute``. nn.Unfold: ``.pad``, a ``.take`` per spatial axis, ``.reshape .permute
    .reshape``.
    """

    name = "unfold"
    modules = (nn.Unfold,)
    functions = (F.unfold,)
    methods = ("unfold",)

    def trace(self, call: Call) -> Any:
        if call.function == "unfold":
            return self._windows(call)
        names = ("kernel_size", "dilation", "padding", "stride")
        found = call.bind("input", *names, dilation=1, padding=0, stride=1)
        if call.module is not None:
            found |= {name: getattr(call.module, name) for name in names}
        x = computed(call, found["input"], "unfold")
        if len(x.shape) != 4:
            raise call.refuse(f"unfolds {len(x.shape)} axes", "Pass [N, C, H, W]")
        kernel, dilation, padding, stride = (spread(found[name], 2) for name in names)
        x = pad_steps(call, x, [(size, size) for size in padding])
        steps, split = list[Step](), [*x.shape[:2]]
        for axis in (0, 1):
            reach = dilation[axis] * (kernel[axis] - 1) + 1
            starts = range(0, x.shape[2 + axis] - reach + 1, stride[axis])
            index = [start + tap * dilation[axis] for tap in range(kernel[axis]) for start in starts]
            steps.append(("take", {"axis": 2 + axis, "index": index}))
            split += [kernel[axis], len(starts)]
        steps += [reshape_to(split), ("permute", {"dims": [0, 1, 2, 4, 3, 5]}), reshape_to(call.out_shape)]
        return finish(call, self.name, x, steps)

    def _windows(self, call: Call) -> Any:
        found = call.bind("input", "dimension", "size", "step")
        x = computed(call, found["input"], "unfold")
        axis, size = static_axis(call, x, found["dimension"], "unfolds"), int(found["size"])
        starts = range(0, x.shape[axis] - size + 1, int(found["step"]))
        index = [start + offset for start in starts for offset in range(size)]
        split = [*x.shape[:axis], len(starts), size, *x.shape[axis + 1 :]]
        order = [i for i in range(len(split)) if i != axis + 1] + [axis + 1]
        steps = [("take", {"axis": axis, "index": index}), reshape_to(split), ("permute", {"dims": order})]
        return finish(call, self.name, x, steps)
