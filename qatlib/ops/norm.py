"""Layer, group, instance and RMS norm, and F.normalize, as steps: the composites of ``docs/numerics.md``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qatlib.ops.base import Call, Ref
from qatlib.ops.composite import INT16, Composite
from qatlib.ops.reduce import centred, positions, reduced, squared


def _input(call: Call, found: dict[str, Any]) -> Ref:
    x = found["input"]
    if not isinstance(x, Ref):
        raise call.refuse("norm of a constant", "Normalize the constant once, in __init__")
    return x


def _settings(call: Call, *names: str, **defaults: Any) -> dict[str, Any]:
    """Arguments of a functional call, or the attributes of the same names of a module."""
    found = call.bind("input", *names, **defaults)
    if call.module is not None:
        found |= {name: getattr(call.module, name) for name in names if hasattr(call.module, name)}
    return found


def _inverse_root(call: Call, power: Ref, eps: float) -> Ref:
    return call.emit("unary", [power], {"function": "rsqrt", "eps": float(eps)}, suffix=".rsqrt", format=INT16)


def standardized(call: Call, x: Ref, axes: Sequence[int], eps: float, more: bool) -> Ref:
    """Steps ``.mean .sub .square .var .rsqrt .mul``; ``more`` steps follow, so that ``.mul`` is an inner one."""
    _, rest = centred(call, x, axes)
    sizes = {"axes": list(axes), "keepdim": True, "divisor": reduced(call, x, axes)}
    variance = call.emit("sum", [squared(call, rest)], sizes, suffix=".var", format=INT16)
    return call.emit("mul", [rest, _inverse_root(call, variance, eps)], suffix=".mul", format=INT16 if more else None)


def affine(call: Call, x: Ref, weight: Any, bias: Any) -> Ref:
    """Steps ``.scale`` and ``.shift``, where there are a weight and a bias that broadcast over x."""
    if weight is not None:
        x = call.emit("mul", [x, call.ref(weight)], suffix=".scale", format=INT16 if bias is not None else None)
    return x if bias is None else call.emit("add", [x, call.ref(bias)], suffix=".shift")


def _over_channels(call: Call, vector: Any, axes: int, what: str) -> Any:
    """A parameter ``[C]`` so that it broadcasts over ``[N, C, *]``, as a view that trains with it."""
    if vector is None:
        return None
    shape = [-1 if isinstance(vector, Ref) else len(vector), *[1] * (axes - 2)]
    return call.emit("reshape", [call.ref(vector)], {"shape": shape}, suffix=what)


class LayerNorm(Composite):
    name = "layer_norm"
    modules = (nn.LayerNorm,)
    functions = (F.layer_norm, torch.layer_norm)

    def trace(self, call: Call) -> Ref:
        found = _settings(call, "normalized_shape", "weight", "bias", "eps", weight=None, bias=None, eps=1e-5)
        x, weight, bias = _input(call, found), found["weight"], found["bias"]
        axes = positions(call, x, list(range(-_count(found["normalized_shape"]), 0)))
        more = weight is not None or bias is not None
        return affine(call, standardized(call, x, axes, found["eps"], more), weight, bias)


def _count(shape: Any) -> int:
    return 1 if isinstance(shape, int) else len(shape)


class RMSNorm(Composite):
    """``x / sqrt(mean(x^2) + eps) * weight``; eps None is the smallest step of float32, as in torch."""

    name = "rms_norm"
    modules = (nn.RMSNorm,)
    functions = (F.rms_norm, torch.rms_norm)

    def trace(self, call: Call) -> Ref:
        found = _settings(call, "normalized_shape", "weight", "eps", weight=None, eps=None)
        x, weight, eps = _input(call, found), found["weight"], found["eps"]
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        axes = positions(call, x, list(range(-_count(found["normalized_shape"]), 0)))
        sizes = {"axes": axes, "keepdim": True, "divisor": reduced(call, x, axes)}
        power = call.emit("sum", [squared(call, x)], sizes, suffix=".mean", format=INT16)
        scale = _inverse_root(call, power, eps)
        out = call.emit("mul", [x, scale], suffix=".mul", format=None if weight is None else INT16)
        return affine(call, out, weight, None)


class GroupNorm(Composite):
    name = "group_norm"
    modules = (nn.GroupNorm,)
    functions = (F.group_norm, torch.group_norm)

    def trace(self, call: Call) -> Ref:
        found = _settings(call, "num_groups", "weight", "bias", "eps", weight=None, bias=None, eps=1e-5)
        x, weight, bias, groups = _input(call, found), found["weight"], found["bias"], int(found["num_groups"])
        if x.shape[0] >= 0:
            raise call.refuse("the first axis does not follow the batch", "Put the batch first")
        more = weight is not None or bias is not None
        rows = call.emit("reshape", [x], {"shape": [-1, groups, reduced(call, x, range(1, len(x.shape))) // groups]},
                         suffix=".groups")  # fmt: skip
        out = standardized(call, rows, [2], found["eps"], more)
        out = call.emit("reshape", [out], {"shape": [-1, *x.shape[1:]]}, suffix=".channels")
        axes = len(x.shape)
        return affine(
            call,
            out,
            _over_channels(call, weight, axes, ".scale.reshape"),
            _over_channels(call, bias, axes, ".shift.reshape"),
        )


class InstanceNorm(Composite):
    """Every channel of every sample by its own statistics."""

    name = "instance_norm"
    modules = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    functions = (F.instance_norm, torch.instance_norm)

    def trace(self, call: Call) -> Ref:
        if call.module is not None:
            tracked = bool(call.module.track_running_stats)
            found = _settings(call, "weight", "bias", "eps")
        else:
            names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
            found = call.bind("input", *names, weight=None, bias=None, use_input_stats=True, eps=1e-5)
            tracked = not found["use_input_stats"]
        if tracked:
            raise call.refuse("instance norm with running statistics", "Use nn.BatchNorm, which is the same then")
        x, weight, bias = _input(call, found), found["weight"], found["bias"]
        axes = len(x.shape)
        if axes < 3 or x.shape[0] >= 0:
            raise call.refuse(f"instance norm of {axes} axes, {list(x.shape)}", "Give it [batch, channels, size]")
        out = standardized(call, x, range(2, axes), found["eps"], weight is not None or bias is not None)
        return affine(
            call,
            out,
            _over_channels(call, weight, axes, ".scale.reshape"),
            _over_channels(call, bias, axes, ".shift.reshape"),
        )


class Normalize(Composite):
    """``x / max(sqrt(sum(x^2)), eps)``. Steps ``.square .sum .rsqrt .mul``; eps^2 is added to the sum instead."""

    name = "normalize"
    functions = (F.normalize,)

    def trace(self, call: Call) -> Ref:
        found = call.bind("input", "p", "dim", "eps", p=2.0, dim=1, eps=1e-12)
        x = _input(call, found)
        if found["p"] != 2:
            raise call.refuse(f"normalizes by the norm p = {found['p']}", "Use p=2")
        axes = positions(call, x, found["dim"])
        sizes = {"axes": axes, "keepdim": True, "divisor": 1}
        power = call.emit("sum", [squared(call, x)], sizes, suffix=".sum", format=INT16)
        return call.emit("mul", [x, _inverse_root(call, power, float(found["eps"]) ** 2)], suffix=".mul")
