"""Calls that compute nothing at inference; the trace drops them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.base import Attrs, Call, Operator, Params, Ref, Traced


class Identity(Operator):
    name = "identity"
    modules = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    functions = (F.dropout, F.dropout2d, torch.clone)
    methods = ("contiguous", "detach", "clone")

    def trace(self, call: Call) -> Traced:
        x = call.bind("input")["input"]
        if not isinstance(x, Ref):
            raise call.refuse("identity of a constant", "Remove it")
        if call.function in (F.dropout, F.dropout2d) and call.bind("input", "p", "training", training=True)["training"]:
            raise call.refuse(
                "F.dropout without training=self.training stays on at inference",
                "Pass training=self.training, or use nn.Dropout",
            )
        return Traced((x,))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0]
