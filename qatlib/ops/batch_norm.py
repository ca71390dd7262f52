"""Batch norm: folded into the convolution or linear layer before it; alone it becomes a depthwise convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatlib.ops.base import Attrs, Call, Operator, Params, Ref, Traced


class BatchNorm(Operator):
    name = "batch_norm"
    modules = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def trace(self, call: Call) -> Traced:
        module, x = call.module, call.bind("input")["input"]
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        if not isinstance(x, Ref):
            raise call.refuse("batch norm of a constant", "Normalize the constant once, in __init__")
        if module.running_mean is None or module.running_var is None:
            raise call.refuse(
                "batch norm without running statistics depends on the other images of the batch",
                "Use track_running_stats=True",
            )
        mean, var = module.running_mean, module.running_var
        params = {"mean": mean, "var": var, "weight": module.weight, "bias": module.bias}
        if module.weight is None:
            params |= {"weight": torch.ones_like(mean), "bias": torch.zeros_like(mean)}
        return Traced((x,), {"eps": module.eps}, params)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        factor, offset = affine(attrs, params)
        shape = (-1, *[1] * (inputs[0].dim() - 2))
        return inputs[0] * factor.view(shape) + offset.view(shape)


def affine(attrs: Attrs, params: Params) -> tuple[Tensor, Tensor]:
    """Batch norm at inference as ``y = factor * x + offset``, per channel."""
    factor = params["weight"].double() / torch.sqrt(params["var"].double() + attrs["eps"])
    offset = params["bias"].double() - params["mean"].double() * factor
    return factor.to(params["weight"].dtype), offset.to(params["weight"].dtype)
