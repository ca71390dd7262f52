"""Convolution over 1, 2 or 3 spatial axes, with zero padding per side, dilation and groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.integer import Geometry, Product, convolve, float_convolve
from qatlib.ops.base import Attrs, Call, Traced
from qatlib.ops.dense import Dense
from qatlib.program import Op


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


class Conv(Dense):
    name = "conv"
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    functions = (F.conv1d, F.conv2d, F.conv3d)
    channel_axis = 1

    def trace(self, call: Call) -> Traced:
        module = call.module
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if module.padding_mode != "zeros":
                raise call.refuse(
                    f"padding_mode={module.padding_mode!r}; only 'zeros' has an integer form",
                    "Use padding_mode='zeros'",
                )
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
        attrs = {
            "stride": spread(found["stride"], len(kernel)),
            "padding": padding_pairs(found["padding"], kernel, dilation),
            "dilation": dilation,
            "groups": int(found["groups"]),
        }
        if isinstance(found["input"], Tensor) or len(found["input"].shape) != len(kernel) + 2:
            raise call.refuse("input without a batch axis", f"Give it {len(kernel) + 2} axes, batch first")
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
