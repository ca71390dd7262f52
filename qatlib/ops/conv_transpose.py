"""Transposed convolution: stride, padding and output padding per side, dilation, groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.integer import Geometry, Product, convolve
from qatlib.ops.base import Attrs, Call, Cost, Ref, Traced
from qatlib.ops.conv import spread
from qatlib.ops.dense import Dense
from qatlib.ops.region import Box, Part, Regions, group_span, image_axes
from qatlib.ops.work import Work, image_pair, size_of
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Array, Graph
    from qatlib.export.integer import ByteProduct, IntegerGraph
    from qatlib.export.qdq import QdqGraph


class ConvTranspose(Dense):
    """The weight is ``[O, I / groups, *kernel]``, output channels first as for every weight of a graph; torch has
    ``[I, O / groups, *kernel]``. ``padding`` is what is cut off each side of the full result; a negative size adds
    zeros.
    """

    name = "conv_transpose"
    modules = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    channel_axis = 1

    def trace(self, call: Call) -> Traced:
        module = call.module
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            found = call.bind("input", "output_size")
            found |= {k: getattr(module, k) for k in ("weight", "bias", "stride", "padding", "dilation", "groups")}
        else:
            found = call.bind(
                "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
                bias=None, stride=1, padding=0, groups=1, dilation=1,
            )  # fmt: skip
        x, weight, groups = found["input"], found["weight"], int(found["groups"])
        if isinstance(weight, Ref):
            raise call.refuse("weights computed from the input", "Keep the weights as parameters of a module")
        kernel = list(weight.shape[2:])
        if not isinstance(x, Ref) or len(x.shape) != len(kernel) + 2:
            raise call.refuse("input without a batch axis", f"Give it {len(kernel) + 2} axes, batch first")
        stride, dilation = spread(found["stride"], len(kernel)), spread(found["dilation"], len(kernel))
        pairs = []
        for axis, before in enumerate(spread(found["padding"], len(kernel))):
            full = (x.shape[2 + axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
            pairs.append([before, full - before - call.out_shape[2 + axis]])
        attrs = {"stride": stride, "padding": pairs, "dilation": dilation, "groups": groups}
        attrs |= {"kernel": kernel, "inputs": x.shape[1]}
        weight = call.derive(weight, f"outputs first, groups {groups}", lambda w: _swap(w, groups))
        return self.weighted(call, x, weight, found["bias"], attrs)

    def geometry_attrs(self, attrs: Attrs) -> dict[str, Any]:
        return {key: attrs[key] for key in ("stride", "padding", "dilation", "groups")}

    def float_product(self, attrs: Attrs, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
        back = _swap(weight, attrs["groups"])
        full = convolution(x, back, None, attrs["stride"], 0, 0, attrs["groups"], attrs["dilation"])
        out = F.pad(full, [-cut for pair in reversed(attrs["padding"]) for cut in pair])
        return out if bias is None else out + self.over_channels(bias, out.dim())

    def product(self, op: Op) -> Product:
        stride, padding = op.attrs["stride"], op.attrs["padding"]
        dilation, groups = op.attrs["dilation"], op.attrs["groups"]

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            axes = [
                _phases(size, taps, step, spread, cut)
                for size, taps, step, spread, cut in zip(
                    x.shape[2:], weight.shape[2:], stride, dilation, padding, strict=True
                )
            ]
            acc = x.new_zeros(x.shape[0], weight.shape[0], *(size for size, _ in axes))
            for phase in itertools.product(*(phases for _, phases in axes)):
                at: tuple[Any, ...] = (..., *(part.outputs for part in phase))
                kernel = weight
                for axis, part in enumerate(phase, start=2):
                    kernel = kernel.index_select(axis, torch.tensor(part.taps, device=weight.device))
                cut = [side for part in reversed(phase) for side in part.padding]
                geometry = Geometry(
                    (1,) * len(phase), ((0, 0),) * len(phase), tuple(part.dilation for part in phase), groups
                )
                acc[at] = convolve(F.pad(x, cut), kernel, None, geometry)
            return acc if bias is None else acc.add_(self.over_channels(bias, acc.dim()))

        return run

    def export_bytes(self, op: Op, graph: IntegerGraph) -> ByteProduct:
        """A convolution with the flipped kernel over the input with zeros between its elements."""
        attrs, value = op.attrs, graph.program.values[op.inputs[0]]
        sizes, stride, dilation = value.shape[2:], attrs["stride"], attrs["dilation"]

        def product(x: str, zero_point: str, weight: Array) -> str:
            zero = graph.constant(np.int8(-128 if zero_point else 0))
            apart = [side for size in sizes for side in (size, 1)]
            x = graph.reshape(x, [-1, weight.shape[1] * attrs["groups"], *apart])
            after = [side for step in stride for side in (0, step - 1)]
            x = graph.node("Pad", x, graph.constant(np.array([0] * (len(after) + 2) + [0, 0, *after])), zero)
            stuffed = [size * step for size, step in zip(sizes, stride, strict=True)]
            x = graph.reshape(x, [-1, weight.shape[1] * attrs["groups"], *stuffed])
            reach = [spread * (taps - 1) for spread, taps in zip(dilation, weight.shape[2:], strict=True)]
            pads = [r - before for r, (before, _) in zip(reach, attrs["padding"], strict=True)]
            pads += [r - last - step + 1 for r, (_, last), step in zip(reach, attrs["padding"], stride, strict=True)]
            axes = len(stride)
            whole = np.array([0, 0, *pads[:axes], 0, 0, *pads[axes:]])
            x = graph.node("Pad", x, graph.constant(whole), zero)
            flipped = np.ascontiguousarray(np.flip(weight, tuple(range(2, weight.ndim))))
            inputs = (x, graph.constant(flipped, op.consts["weight"]), *([zero_point] if zero_point else []))
            return graph.node("ConvInteger", *inputs, dilations=dilation, group=attrs["groups"])

        return product

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        attrs, consts = super().float_form(op, program, graph)
        kernel, inputs = list(program.constant(op, "weight").shape[2:]), program.in_values(op)[0].shape[1]
        return {**attrs, "kernel": kernel, "inputs": inputs}, consts

    def export_product(self, attrs: Attrs, x: str, weight: str, bias: str, graph: Graph) -> str:
        kernel, groups, inputs = attrs["kernel"], attrs["groups"], attrs["inputs"]
        weight = graph.reshape(weight, [groups, -1, inputs // groups, *kernel])
        weight = graph.node("Transpose", weight, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
        weight = graph.node("Reshape", weight, graph.constant(np.array([inputs, -1, *kernel])))
        pads = [before for before, _ in attrs["padding"]] + [max(0, after) for _, after in attrs["padding"]]
        more = [max(0, -after) for _, after in attrs["padding"]]
        return graph.node(
            "ConvTranspose", x, weight, bias, strides=attrs["stride"], pads=pads, output_padding=more,
            dilations=attrs["dilation"], group=groups,
        )  # fmt: skip

    def over_channels(self, vector: Tensor, axes: int) -> Tensor:
        return vector.view(-1, *[1] * (axes - 2))

    def cost(self, op: Op, program: Program) -> Cost:
        """Every element of the input meets every weight of its channel once, whatever the stride."""
        base = super().cost(op, program)
        outputs = program.constant(op, "weight")[:, 0].numel() // op.attrs["groups"]
        macs = program.in_values(op)[0].elements() * outputs
        return Cost(macs, base.vector_ops, base.weight_bytes, base.input_bytes, base.output_bytes)

    def regions(self, op: Op, program: Program) -> Regions:
        weight, groups, stride = program.constant(op, "weight"), op.attrs["groups"], op.attrs["stride"]
        outputs, inputs, *kernel = weight.shape
        geometry = list(
            zip(kernel, stride, op.attrs["dilation"], (before for before, _ in op.attrs["padding"]), strict=True)
        )

        def part(box: Box) -> Part:
            batch, span, *image = box
            found = [_inputs_of(span, *axis) for span, axis in zip(image, geometry, strict=True)]
            channels = group_span(span, outputs // groups, inputs)
            attrs = {**op.attrs, "padding": [list(cut) for _, cut in found]}
            attrs["groups"] = (channels[1] - channels[0]) // inputs
            return self.channel_part(op, program, box, span, (batch, channels, *(reads for reads, _ in found)), attrs)

        rows, columns = image_pair(stride)
        return Regions(image_axes(program.values[op.output]), part, (rows, columns), outputs // groups)

    def work(self, op: Op, program: Program) -> Work:
        """The convolution of stride 1 whose channels hold all outputs between two inputs: the phases side by side."""
        weight, stride, groups = program.constant(op, "weight"), image_pair(op.attrs["stride"]), op.attrs["groups"]
        kernel = image_pair(weight.shape[2:])
        (rows, columns, inputs), out = size_of(program.in_values(op)[0]), size_of(program.values[op.output])
        sizes = -(-out[0] // stride[0]), -(-out[1] // stride[1]), out[2] * math.prod(stride) // groups
        taps = -(-kernel[0] // stride[0]), -(-kernel[1] // stride[1])
        overlays = tuple(range(1, len(op.inputs)))
        return Work("sums", (rows, columns, inputs // groups), sizes, taps, times=groups, overlays=overlays)


def _swap(weight: Tensor, groups: int) -> Tensor:
    """``[I, O / groups, *kernel]`` to ``[O, I / groups, *kernel]``, and back."""
    parts = weight.reshape(groups, -1, *weight.shape[1:])
    return parts.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class _Phase:
    """Outputs of one axis that meet the same taps: a plain convolution with those taps, in descending order."""

    outputs: slice
    taps: tuple[int, ...]
    dilation: int
    padding: tuple[int, int]


def _inputs_of(
    span: tuple[int, int], kernel: int, stride: int, dilation: int, before: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Positions of an axis that outputs in ``span`` meet, and what of their full result is cut off on both sides.

    Position u meets output ``u * stride + t * dilation - before`` with tap t.
    """
    first, last = span[0] + before, span[1] - 1 + before
    start = min(-((dilation * (kernel - 1) - first) // stride), first // stride)
    stop = last // stride + 1
    reach = (stop - start - 1) * stride + dilation * (kernel - 1) + 1
    ahead = first - start * stride
    return (start, stop), (ahead, reach - ahead - (span[1] - span[0]))


def _phases(size: int, kernel: int, stride: int, dilation: int, padding: Sequence[int]) -> tuple[int, list[_Phase]]:
    """Output size of an axis, and its phases.

    Output y is the sum of ``x[u] * w[t]`` over ``u * stride + t * dilation = y + padding[0]``.
    """
    out = (size - 1) * stride + dilation * (kernel - 1) + 1 - sum(padding)
    phases = []
    for phase in range(stride):
        taps = [t for t in range(kernel) if t * dilation % stride == phase]
        first = (phase - padding[0]) % stride
        if not taps or first >= out:
            continue
        low = (first + padding[0] - phase) // stride
        high = low + (out - 1 - first) // stride
        moves = [(t * dilation - phase) // stride for t in taps]
        apart = moves[1] - moves[0] if len(moves) > 1 else 1
        before, after = moves[-1] - low, high - moves[0] - (size - 1)
        phases.append(_Phase(slice(first, None, stride), tuple(reversed(taps)), apart, (before, after)))
    return out, phases
