"""Max, average and adaptive average pooling over 1, 2 or 3 spatial axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.factors import factor
from qatlib.integer import EXACT_FLOAT32, INT32, Requantizer, pad
from qatlib.ops.base import Attrs, Call, Cost, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.clamp import export_clamp
from qatlib.ops.conv import spread
from qatlib.ops.region import Box, Need, Part, Regions, image_axes, whole, window_span, without
from qatlib.ops.work import Work, image_pair, size_of
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Array, Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering


MULTIPLIER_ERROR = 2.0**-18
"""A relative difference that a multiplier of the usual 20 bits cannot tell from 0."""


def _window(call: Call, found: dict[str, Any]) -> dict[str, Any]:
    """Kernel, stride, dilation and padding per axis; ceil mode becomes padding after the last element."""
    x = found["input"]
    if not isinstance(x, Ref):
        raise call.refuse("pooling of a constant", "Pool the constant once, in __init__")
    axes = len(x.shape) - 2
    kernel = spread(found["kernel_size"], axes)
    stride = spread(found["stride"] if found.get("stride") not in (None, ()) else kernel, axes)
    dilation = spread(found.get("dilation", 1), axes)
    pairs = []
    for axis, before in enumerate(spread(found["padding"], axes)):
        reach = (call.out_shape[2 + axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        pairs.append([before, max(before, reach - x.shape[2 + axis] - before)])
    return {"kernel": kernel, "stride": stride, "padding": pairs, "dilation": dilation}


def _settings(call: Call, *names: str, **defaults: Any) -> dict[str, Any]:
    """Arguments of a functional call, or the attributes of the same names of a module."""
    found = call.bind("input", *names, **defaults)
    if call.module is not None:
        found |= {name: getattr(call.module, name, defaults.get(name)) for name in names}
    return found


def _padded(graph: Graph, attrs: Attrs, x: str, value: Any) -> tuple[str, list[int]]:
    """``x`` and the padding that is left to an ONNX pool: all of it, unless it reaches a kernel's size."""
    if all(max(pair) < size for pair, size in zip(attrs["padding"], attrs["kernel"], strict=True)):
        return x, [before for before, _ in attrs["padding"]] + [after for _, after in attrs["padding"]]
    return graph.pad(x, attrs["padding"], value), [0] * 2 * len(attrs["kernel"])


def _uniform(sizes: Sequence[int], outs: Sequence[int]) -> bool:
    return all(size % out == 0 for size, out in zip(sizes, outs, strict=True))


class MaxPool(Operator):
    name = "max_pool"
    modules = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
    functions = (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
    keeps_scale = True

    def trace(self, call: Call) -> Traced:
        found = _settings(
            call, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices",
            stride=None, padding=0, dilation=1,
        )  # fmt: skip
        if found.get("return_indices"):
            raise call.refuse("max pooling that returns indices", "Pool without return_indices")
        return Traced((found["input"],), _window(call, found))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        axes = len(attrs["kernel"])
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
        x, padding = inputs[0], [before for before, _ in attrs["padding"]]
        fits = all(b == a and 2 * b <= k for (b, a), k in zip(attrs["padding"], attrs["kernel"], strict=True))
        if not fits:
            x, padding = pad(x, attrs["padding"], -math.inf), [0] * axes
        return pool(x, attrs["kernel"], attrs["stride"], padding, attrs["dilation"])

    def lower(self, low: Lowering) -> None:
        low.emit(self.name, dict(low.attrs))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        return lambda x: self.forward(op.attrs, {}, x)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        qtype = graph.qtype(op.output)
        carrier = "int8" if qtype.dtype == "int8" else "float32"
        x = graph.read(op.inputs[0], carrier)
        graph.write(op.output, self._onnx(graph, op.attrs, x, np.array(qtype.limits[0], carrier)))

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return self._onnx(graph, attrs, inputs[0], np.float32(-np.inf))

    @staticmethod
    def _onnx(graph: Graph, attrs: Attrs, x: str, lowest: Any) -> str:
        x, pads = _padded(graph, attrs, x, lowest)
        return graph.node(
            "MaxPool",
            x,
            kernel_shape=attrs["kernel"],
            strides=attrs["stride"],
            pads=pads,
            dilations=attrs["dilation"],
        )

    def regions(self, op: Op, program: Program) -> Regions:
        return _pool_regions(op, program, -math.inf)

    def cost(self, op: Op, program: Program) -> Cost:
        return _pool_cost(super().cost(op, program), op)

    def work(self, op: Op, program: Program) -> Work:
        return _pool_work(op, program)


def _pool_regions(op: Op, program: Program, fill: float, roles: Sequence[str] = ()) -> Regions:
    """Regions of windows; constants of ``roles`` may hold a number per position."""
    kernel = op.attrs["kernel"]
    geometry = list(
        zip(
            kernel, op.attrs["stride"], op.attrs.get("dilation", [1] * len(kernel)),
            (before for before, _ in op.attrs["padding"]), strict=True,
        )
    )  # fmt: skip
    attrs = {**op.attrs, "padding": [[0, 0] for _ in kernel]}
    own = {role: program.constant(op, role) for role in roles}
    varied = {role: x for role, x in own.items() if x.numel() > 1}

    def part(box: Box) -> Part:
        image = box[2:]
        reads = [window_span(span, *axis) for span, axis in zip(image, geometry, strict=True)]

        def consts() -> dict[str, Tensor]:
            return {role: _cropped(x, image) for role, x in varied.items()}

        return Part((Need((*box[:2], *reads), fill),), attrs, consts, image if varied else ())

    return Regions(image_axes(program.values[op.output]), part)


def _cropped(x: Tensor, image: Box) -> Tensor:
    """``image`` of one number per position; an axis of size 1 stands for all positions."""
    return x[tuple(slice(None) if size == 1 else slice(*span) for size, span in zip(x.shape, image, strict=True))]


def _pool_cost(base: Cost, op: Op) -> Cost:
    taps = math.prod(op.attrs["kernel"])
    return Cost(0, base.vector_ops * taps, base.weight_bytes, base.input_bytes, base.output_bytes)


def _pool_work(op: Op, program: Program) -> Work:
    sizes = size_of(program.in_values(op)[0]), size_of(program.values[op.output])
    kernel, stride = image_pair(op.attrs["kernel"]), image_pair(op.attrs["stride"])
    dilation = image_pair(op.attrs.get("dilation", [1]))
    return Work("windows", *sizes, kernel, stride, dilation, own_channel=True)


def _requantized_mean(low: Lowering, kind: str, attrs: dict[str, Any], divisors: Tensor) -> None:
    """Emit a pool whose sum is divided by ``divisors``: one number, or one per output position."""
    if bool((divisors == divisors.flatten()[0]).all()):
        divisors = divisors.flatten()[:1]
    scale, out = low.input_scale(0), low.output_scale
    solved = [factor(scale / (out * count), low.bits, low.name) for count in divisors.flatten().tolist()]
    attrs["lo"], attrs["hi"] = low.output_clamp()
    consts = {
        "multiplier": torch.tensor([m for m, _ in solved], dtype=torch.int32).view(divisors.shape),
        "shift": torch.tensor([n for _, n in solved], dtype=torch.int32).view(divisors.shape),
    }
    low.emit(kind, attrs, consts)


def _outer(counts: Sequence[Sequence[int]]) -> Tensor:
    """Product of one count per axis, for every output position."""
    total = torch.ones((), dtype=torch.int64)
    for axis in counts:
        total = total.unsqueeze(-1) * torch.tensor(axis)
    return total


def _mean_of_sums(op: Op, program: Program, bound: int) -> tuple[torch.dtype, Callable[[Tensor], Tensor]]:
    """The dtype in which window sums up to ``bound`` are exact, and what turns them into codes."""
    consts = program.constant(op, "multiplier"), program.constant(op, "shift")
    requantize = Requantizer.plan([consts[0]], consts[1], [min(bound, 2**31)], op.attrs["lo"], op.attrs["hi"])

    def finish(total: Tensor) -> Tensor:
        return requantize(total.clamp_(*INT32) if bound > INT32[1] else total, reuse=True)

    return torch.float32 if bound < EXACT_FLOAT32 else torch.float64, finish


def _export_sums(graph: Graph, x: str, matrices: Sequence[Array]) -> str:
    """Window sums of ``x`` ``[N, C, *in]``: one product with a 0/1 matrix ``[out, in]`` per spatial axis.

    Sums over windows are separable, whatever their stride, padding and sizes. Every step turns the first spatial axis
    to the end and sums over it, so that after the last one all axes are back in place.
    """
    axes = len(matrices)
    for matrix in matrices:
        if axes > 1:
            x = graph.node("Transpose", x, perm=[0, 1, *range(3, 2 + axes), 2])
        x = graph.node("MatMul", x, graph.constant(matrix.T))
    return x


def _membership(windows: Sequence[tuple[int, int]], size: int, dtype: str) -> Array:
    """``[out, in]``: 1 where the element is in the window [start, stop)."""
    at = np.arange(size)
    return np.array([(start <= at) & (at < stop) for start, stop in windows]).astype(dtype)


def _export_mean(graph: IntegerGraph, op: Op, program: Program, windows: Sequence[Sequence[tuple[int, int]]]) -> None:
    """The integer form of both average pools; ``windows`` per axis and position may reach into padding."""
    (x,) = program.in_values(op)
    matrices = [_membership(axis, size, "float64") for axis, size in zip(windows, x.shape[2:], strict=True)]
    acc = _export_sums(graph, graph.read(x.name, "float64"), matrices)
    taps = math.prod(int(matrix.sum(axis=1).max()) for matrix in matrices)
    acc = graph.saturate(acc, taps * -x.qtype.limits[0])
    multiplier, shift = (program.constant(op, role).numpy() for role in ("multiplier", "shift"))
    graph.write(op.output, graph.requantize([(acc, multiplier)], shift, op.attrs["lo"], op.attrs["hi"]))


def _real_share(op: Op, program: Program, graph: QdqGraph) -> Array:
    """What a window sum is multiplied with, in real numbers; per output position or one for all."""
    (x,) = program.in_values(op)
    return np.asarray(graph.accumulator_scale(op) / x.qtype.scale)


class AvgPool(Operator):
    name = "avg_pool"
    modules = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    functions = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)

    def trace(self, call: Call) -> Traced:
        found = _settings(
            call, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
            stride=None, padding=0, count_include_pad=True, divisor_override=None,
        )  # fmt: skip
        attrs = _window(call, found)
        del attrs["dilation"]
        x: Ref = found["input"]
        axes = range(len(attrs["kernel"]))
        before = spread(found["padding"], len(attrs["kernel"]))
        inner = bool(found["count_include_pad"])
        counts = [
            [
                self._taps(position * attrs["stride"][axis] - before[axis], attrs["kernel"][axis], x.shape[2 + axis],
                           before[axis] if inner else 0)
                for position in range(call.out_shape[2 + axis])
            ]
            for axis in axes
        ]  # fmt: skip
        if found["divisor_override"]:
            counts = [
                [int(found["divisor_override"]) if axis == 0 else 1 for _ in row] for axis, row in enumerate(counts)
            ]
        return Traced((x,), {**attrs, "counts": counts})

    @staticmethod
    def _taps(start: int, kernel: int, size: int, counted: int) -> int:
        """Elements of one window that the mean divides by; ``counted`` is how far padding counts as elements."""
        return min(start + kernel, size + counted) - max(start, -counted)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return self._sum(attrs, inputs[0]) / _outer(attrs["counts"]).to(inputs[0])

    @staticmethod
    def _sum(attrs: Attrs, x: Tensor) -> Tensor:
        kernel, stride = attrs["kernel"], attrs["stride"]
        x = pad(x, attrs["padding"])
        if list(x.shape[2:]) == kernel:
            return x.sum(list(range(2, x.dim())), keepdim=True)
        if len(kernel) == 1:
            return F.avg_pool2d(x.unsqueeze(2), [1, *kernel], [1, *stride], divisor_override=1).squeeze(2)
        pool = F.avg_pool2d if len(kernel) == 2 else F.avg_pool3d
        return pool(x, kernel, stride, divisor_override=1)

    def lower(self, low: Lowering) -> None:
        attrs = {key: low.attrs[key] for key in ("kernel", "stride", "padding")}
        _requantized_mean(low, self.name, attrs, _outer(low.attrs["counts"]))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        bound = math.prod(op.attrs["kernel"]) * max(-ranges[0][0], ranges[0][1])
        carrier, finish = _mean_of_sums(op, program, bound)
        return lambda x: finish(self._sum(op.attrs, x.to(carrier)))

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        axes = zip(
            *(op.attrs[key] for key in ("kernel", "stride", "padding")),
            program.values[op.output].shape[2:],
            strict=True,
        )
        windows = [
            [(start * stride - pair[0], start * stride - pair[0] + kernel) for start in range(out)]
            for kernel, stride, pair, out in axes
        ]
        _export_mean(graph, op, program, windows)

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        return {**graph.real_attrs(op), "share": _real_share(op, program, graph)}, {}

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        """The mean with every window's full size as divisor, corrected where the divisor is another."""
        x, pads = _padded(graph, attrs, inputs[0], np.float32(0))
        geometry = {"kernel_shape": attrs["kernel"], "strides": attrs["stride"], "pads": pads}
        mean = graph.node("AveragePool", x, count_include_pad=1, **geometry)
        share = attrs["share"] if "share" in attrs else 1 / _outer(attrs["counts"]).numpy()
        correction = np.float32(share * math.prod(attrs["kernel"]))
        if not np.allclose(correction, 1, rtol=MULTIPLIER_ERROR, atol=0):
            mean = graph.node("Mul", mean, graph.constant(correction))
        return export_clamp(graph, mean, attrs.get("clamp"))

    def regions(self, op: Op, program: Program) -> Regions:
        return _pool_regions(op, program, 0.0, ("multiplier", "shift"))

    def cost(self, op: Op, program: Program) -> Cost:
        return _pool_cost(super().cost(op, program), op)

    def work(self, op: Op, program: Program) -> Work:
        return _pool_work(op, program)


def _adaptive(call: Call) -> dict[str, Any]:
    found = _settings(call, "output_size")
    if not isinstance(found["input"], Ref):
        raise call.refuse("pooling of a constant", "Pool the constant once, in __init__")
    return {"input": found["input"], "sizes": list(found["input"].shape[2:]), "outs": list(call.out_shape[2:])}


def windows(size: int, out: int) -> list[tuple[int, int]]:
    """Windows of adaptive pooling along one axis, as torch defines them."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _whole_images(op: Op, program: Program) -> Regions:
    """Regions of an op that takes whole images: of channels."""
    out, (x,) = program.values[op.output], program.in_values(op)
    axes = without(image_axes(out), range(2, len(out.shape)))
    return Regions(axes, lambda box: Part((Need((*box[:2], *whole(x.sizes()[2:]))),)))


class AdaptiveMaxPool(Operator):
    """Windows of equal size become a ``max_pool``."""

    name = "adaptive_max_pool"
    form = "reduction"
    modules = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
    functions = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
    keeps_scale = True

    def trace(self, call: Call) -> Traced:
        found = _adaptive(call)
        if call.kwargs.get("return_indices") or getattr(call.module, "return_indices", False):
            raise call.refuse("max pooling that returns indices", "Pool without return_indices")
        return Traced((found["input"],), {"sizes": found["sizes"], "output_size": found["outs"]})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(attrs["output_size"]) - 1]
        out: Tensor = pool(inputs[0], attrs["output_size"])
        return out

    def lower(self, low: Lowering) -> None:
        sizes, outs = low.attrs["sizes"], low.attrs["output_size"]
        if not _uniform(sizes, outs):
            low.emit(self.name, {"output_size": outs})
            return
        kernel = [size // out for size, out in zip(sizes, outs, strict=True)]
        attrs = {"kernel": kernel, "stride": kernel, "padding": [[0, 0] for _ in kernel], "dilation": [1] * len(kernel)}
        low.emit(MaxPool.name, attrs)

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        return lambda x: self.forward(op.attrs, {}, x)

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        (x,) = program.in_values(op)
        graph.write(op.output, self._onnx(graph, op.attrs, graph.read(x.name, "float32"), x.shape[2:]))

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        return {**op.attrs, "sizes": list(program.in_values(op)[0].shape[2:])}, {}

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        return self._onnx(graph, attrs, inputs[0], attrs["sizes"])

    @staticmethod
    def _onnx(graph: Graph, attrs: Attrs, x: str, sizes: Sequence[int]) -> str:
        """Axis by axis the largest of all windows' first, second, … elements; short windows repeat their last."""
        for axis, (size, out) in enumerate(zip(sizes, attrs["output_size"], strict=True), start=2):
            cuts = windows(size, out)
            widest = max(stop - start for start, stop in cuts)
            taps = [np.array([min(start + i, stop - 1) for start, stop in cuts]) for i in range(widest)]
            x = graph.node("Max", *(graph.node("Gather", x, graph.constant(tap), axis=axis) for tap in taps))
        return x

    def regions(self, op: Op, program: Program) -> Regions:
        return _whole_images(op, program)

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        return Cost(0, program.in_values(op)[0].elements(), base.weight_bytes, base.input_bytes, base.output_bytes)


class AdaptiveAvgPool(Operator):
    """Windows of equal size become an ``avg_pool``; unequal ones are summed one by one."""

    name = "adaptive_avg_pool"
    form = "reduction"
    modules = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    functions = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)

    def trace(self, call: Call) -> Traced:
        found = _adaptive(call)
        return Traced((found["input"],), {"sizes": found["sizes"], "output_size": found["outs"]})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(attrs["sizes"]) - 1]
        return pool(inputs[0], attrs["output_size"])

    def lower(self, low: Lowering) -> None:
        sizes, outs = low.attrs["sizes"], low.attrs["output_size"]
        if _uniform(sizes, outs):
            kernel = [size // out for size, out in zip(sizes, outs, strict=True)]
            attrs = {"kernel": kernel, "stride": kernel, "padding": [[0, 0] for _ in kernel]}
            _requantized_mean(low, AvgPool.name, attrs, torch.tensor([math.prod(kernel)]))
            return
        counts = [[stop - start for start, stop in windows(s, o)] for s, o in zip(sizes, outs, strict=True)]
        _requantized_mean(low, self.name, {"output_size": outs}, _outer(counts))

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        (x,) = program.in_values(op)
        cuts = [windows(size, out) for size, out in zip(x.shape[2:], op.attrs["output_size"], strict=True)]
        taps = math.prod(max(stop - start for start, stop in axis) for axis in cuts)
        bound = taps * max(-ranges[0][0], ranges[0][1])
        carrier, finish = _mean_of_sums(op, program, bound)
        axes = list(range(2, 2 + len(cuts)))
        positions: list[tuple[Any, ...]] = list(
            itertools.product(*([slice(*window) for window in axis] for axis in cuts))
        )

        def run(x: Tensor) -> Tensor:
            x = x.to(carrier)
            sums = [x[(..., *position)].sum(axes) for position in positions]
            acc = torch.stack(sums, -1).reshape(*x.shape[:2], *op.attrs["output_size"])
            return finish(acc)

        return run

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        (x,) = program.in_values(op)
        _export_mean(
            graph, op, program, [windows(*pair) for pair in zip(x.shape[2:], op.attrs["output_size"], strict=True)]
        )

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        sizes = list(program.in_values(op)[0].shape[2:])
        return {**graph.real_attrs(op), "sizes": sizes, "share": _real_share(op, program, graph)}, {}

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        cuts = [windows(size, out) for size, out in zip(attrs["sizes"], attrs["output_size"], strict=True)]
        matrices = [_membership(cut, size, "float32") for cut, size in zip(cuts, attrs["sizes"], strict=True)]
        share = attrs["share"] if "share" in attrs else 1 / _outer([matrix.sum(axis=1) for matrix in matrices]).numpy()
        total = _export_sums(graph, inputs[0], matrices)
        return export_clamp(graph, graph.node("Mul", total, graph.constant(np.float32(share))), attrs.get("clamp"))

    def regions(self, op: Op, program: Program) -> Regions:
        return _whole_images(op, program)

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        return Cost(0, program.in_values(op)[0].elements(), base.weight_bytes, base.input_bytes, base.output_bytes)
