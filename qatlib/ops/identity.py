"""Calls that compute nothing at inference; the trace drops them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.base import Attrs, Call, Operator, Params, Ref, Traced

_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
)


class Identity(Operator):
    name = "identity"
    modules = (
        *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    )
    functions = (*_DROPOUTS, torch.clone, torch.detach, torch.positive, operator.pos)
    methods = ("contiguous", "detach", "detach_", "clone", "positive", "__pos__")

    def trace(self, call: Call) -> Any:
        x = call.bind("input")["input"]
        if not isinstance(x, Ref):
            return x
        if call.function in _DROPOUTS and _stays_on(call):
            raise call.refuse(
                "F.dropout without training=self.training stays on at inference",
                "Pass training=self.training, or use nn.Dropout",
            )
        return Traced((x,))

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        return inputs[0]


def _stays_on(call: Call) -> bool:
    """Whether a dropout drops at inference too."""
    default = call.function not in (F.alpha_dropout, F.feature_alpha_dropout)
    return bool(call.bind("input", "p", "training", training=call.kwargs.get("train", default))["training"])
