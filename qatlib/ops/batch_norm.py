"""Batch norm: folded into the convolution or linear layer before it; alone it becomes a depthwise convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.ops.base import Attrs, Call, Operator, Params, Ref, Traced


class BatchNorm(Operator):
    name = "batch_norm"
    modules = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    functions = (F.batch_norm,)

    def trace(self, call: Call) -> Traced:
        names = ("running_mean", "running_var", "weight", "bias", "momentum", "eps")
        found = call.bind(
            "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
            weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
        )  # fmt: skip
        if call.module is not None:
            found |= {name: getattr(call.module, name) for name in names}
        if not isinstance(found["input"], Ref):
            raise call.refuse("batch norm of a constant", "Normalize the constant once, in __init__")
        mean, var = found["running_mean"], found["running_var"]
        if mean is None or var is None or found["training"]:
            raise call.refuse(
                "batch norm without running statistics depends on the other images of the batch",
                "Use track_running_stats=True",
            )
        weight = torch.ones_like(mean) if found["weight"] is None else found["weight"]
        bias = torch.zeros_like(mean) if found["bias"] is None else found["bias"]
        if any(isinstance(tensor, Ref) for tensor in (mean, var, weight, bias)):
            raise call.refuse("batch norm by statistics computed in the model", "Keep them as buffers of a module")
        params = {"mean": mean, "var": var, "weight": weight, "bias": bias}
        return Traced((found["input"],), {name: found[name] for name in ("eps", "momentum")}, params)

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        factor, offset = affine(attrs, params)
        shape = (-1, *[1] * (inputs[0].dim() - 2))
        return inputs[0] * factor.view(shape) + offset.view(shape)


def affine(attrs: Attrs, params: Params) -> tuple[Tensor, Tensor]:
    """Batch norm at inference as ``y = factor * x + offset``, per channel."""
    factor = params["weight"].double() / torch.sqrt(params["var"].double() + attrs["eps"])
    offset = params["bias"].double() - params["mean"].double() * factor
    return factor.to(params["weight"].dtype), offset.to(params["weight"].dtype)
