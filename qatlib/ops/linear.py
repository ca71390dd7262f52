"""Linear layer over the last axis."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.integer import Product
from qatlib.ops.base import Attrs, Call, Traced
from qatlib.ops.dense import Dense
from qatlib.program import Op


class Linear(Dense):
    name = "linear"
    modules = (nn.Linear,)
    functions = (F.linear,)
    channel_axis = -1

    def trace(self, call: Call) -> Traced:
        if isinstance(call.module, nn.Linear):
            found = {**call.bind("input"), "weight": call.module.weight, "bias": call.module.bias}
        else:
            found = call.bind("input", "weight", "bias", bias=None)
        return self.weighted(call, found["input"], found["weight"], found["bias"], {})

    def geometry_attrs(self, attrs: Attrs) -> dict[str, Any]:
        return {}

    def float_product(self, attrs: Attrs, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def product(self, op: Op) -> Product:
        return F.linear

    def over_channels(self, vector: Tensor, axes: int) -> Tensor:
        return vector
