"""Convolution over 1, 2 or 3 spatial axes, with zero padding per side, dilation and groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.integer import Geometry, Product, convolve, float_convolve
from qatlib.ops.base import Attrs, Call, Traced
from qatlib.ops.dense import Dense
from qatlib.ops.pad import pad_steps
from qatlib.ops.region import Box, Part, Regions, group_span, image_axes, window_span
from qatlib.ops.work import Work, image_pair, size_of
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Array, Graph
    from qatlib.export.integer import ByteProduct, IntegerGraph


def spread(value: Any, axes: int) -> list[int]:
    """An int or a sequence as one int per spatial axis."""
    values = [value] * axes if isinstance(value, int) else list(value)
    return [int(v) for v in (values * axes if len(values) == 1 else values)]


def padding_pairs(padding: Any, kernel: list[int], dilation: list[int]) -> list[list[int]]:
    """torch's padding argument as (before, after) per axis; "same" puts the odd element after, as torch does."""
    if padding == "valid":
        return [[0, 0] for _ in kernel]
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [[total // 2, total - total // 2] for total in totals]
    return [[p, p] for p in spread(padding, len(kernel))]


def _geometry(attrs: Attrs) -> Geometry:
    padding = tuple((before, after) for before, after in attrs["padding"])
    return Geometry(tuple(attrs["stride"]), padding, tuple(attrs["dilation"]), attrs["groups"])


def _onnx_geometry(attrs: Attrs) -> dict[str, Any]:
    """Attributes of the ONNX convolutions."""
    pads = [before for before, _ in attrs["padding"]] + [after for _, after in attrs["padding"]]
    return {"strides": attrs["stride"], "pads": pads, "dilations": attrs["dilation"], "group": attrs["groups"]}


class Conv(Dense):
    name = "conv"
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    functions = (F.conv1d, F.conv2d, F.conv3d)
    channel_axis = 1

    def trace(self, call: Call) -> Traced:
        module = call.module
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found = call.bind("input")
            found |= {
                key: getattr(module, key) for key in ("weight", "bias", "stride", "padding", "dilation", "groups")
            }
        else:
            found = call.bind(
                "input", "weight", "bias", "stride", "padding", "dilation", "groups",
                bias=None, stride=1, padding=0, dilation=1, groups=1,
            )  # fmt: skip
        kernel = list(found["weight"].shape[2:])
        dilation = spread(found["dilation"], len(kernel))
        attrs: dict[str, Any] = {
            "stride": spread(found["stride"], len(kernel)),
            "padding": padding_pairs(found["padding"], kernel, dilation),
            "dilation": dilation,
            "groups": int(found["groups"]),
        }
        if isinstance(found["input"], Tensor) or len(found["input"].shape) != len(kernel) + 2:
            raise call.refuse("input without a batch axis", f"Give it {len(kernel) + 2} axes, batch first")
        mode = getattr(module, "padding_mode", "zeros")
        if mode != "zeros":
            found["input"] = pad_steps(call, found["input"], attrs["padding"], mode)
            attrs["padding"] = [[0, 0] for _ in kernel]
        return self.weighted(call, found["input"], found["weight"], found["bias"], attrs)

    def geometry_attrs(self, attrs: Attrs) -> dict[str, Any]:
        return {key: attrs[key] for key in ("stride", "padding", "dilation", "groups")}

    def float_product(self, attrs: Attrs, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return float_convolve(x, weight, bias, _geometry(attrs))

    def product(self, op: Op) -> Product:
        geometry = _geometry(op.attrs)
        return lambda x, weight, bias: convolve(x, weight, bias, geometry)

    def over_channels(self, vector: Tensor, axes: int) -> Tensor:
        return vector.view(-1, *[1] * (axes - 2))

    def export_bytes(self, op: Op, graph: IntegerGraph) -> ByteProduct:
        """ConvInteger pads with the zero point, so that padding counts 0 for every byte."""
        geometry = _onnx_geometry(op.attrs)

        def product(x: str, zero_point: str, weight: Array) -> str:
            inputs = (x, graph.constant(weight, op.consts["weight"]), *([zero_point] if zero_point else []))
            return graph.node("ConvInteger", *inputs, **geometry)

        return product

    def export_product(self, attrs: Attrs, x: str, weight: str, bias: str, graph: Graph) -> str:
        return graph.node("Conv", x, weight, bias, **_onnx_geometry(attrs))

    def regions(self, op: Op, program: Program) -> Regions:
        weight, groups = program.constant(op, "weight"), op.attrs["groups"]
        outputs, inputs, *kernel = weight.shape
        geometry = list(
            zip(
                kernel, op.attrs["stride"], op.attrs["dilation"], (before for before, _ in op.attrs["padding"]),
                strict=True,
            )
        )  # fmt: skip

        def part(box: Box) -> Part:
            batch, span, *image = box
            reads = [window_span(span, *axis) for span, axis in zip(image, geometry, strict=True)]
            channels = group_span(span, outputs // groups, inputs)
            attrs = {**op.attrs, "padding": [[0, 0] for _ in kernel]}
            attrs["groups"] = (channels[1] - channels[0]) // inputs
            return self.channel_part(op, program, box, span, (batch, channels, *reads), attrs)

        return Regions(image_axes(program.values[op.output]), part, group=outputs // groups)

    def work(self, op: Op, program: Program) -> Work:
        """A group of several channels is a repetition."""
        weight, groups = program.constant(op, "weight"), op.attrs["groups"]
        (rows, columns, inputs), out = size_of(program.in_values(op)[0]), size_of(program.values[op.output])
        own, times = groups > 1 and weight.shape[1] == 1, 1
        if groups > 1 and not own:
            inputs, out, times = inputs // groups, (*out[:2], out[2] // groups), groups
        kernel, stride, dilation = map(image_pair, (weight.shape[2:], op.attrs["stride"], op.attrs["dilation"]))
        overlays = tuple(range(1, len(op.inputs)))
        return Work(
            "sums",
            (rows, columns, inputs),
            out,
            kernel,
            stride,
            dilation,
            own_channel=own,
            times=times,
            overlays=overlays,
        )
