"""softmax, softmin and log_softmax as steps: the section on composites of ``docs/numerics.md``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qatlib.ops.base import Call, Format, Ref
from qatlib.ops.composite import INT16, Composite
from qatlib.ops.masks import BELOW
from qatlib.ops.reduce import positions

_DIFFERENCE = Format("int16", BELOW / 2**15)
_EXPONENTIAL = Format("int16", 1 / (2**15 - 1))


class Softmax(Composite):
    name = "softmax"
    modules = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
    functions = (torch.softmax, F.softmax, F.softmin, F.log_softmax, torch.log_softmax)
    methods = ("softmax", "log_softmax")

    def trace(self, call: Call) -> Ref:
        found = call.bind("input", "dim", dim=None)
        x, dim = found["input"], found["dim"]
        if not isinstance(x, Ref):
            raise call.refuse("softmax of a constant", "Compute the constant once, in __init__")
        if call.module is not None:
            dim = -3 if isinstance(call.module, nn.Softmax2d) else call.module.dim
        if dim is None:  # torch's implicit choice
            dim = 0 if len(x.shape) in (0, 1, 3) else 1
        (axis,) = positions(call, x, int(dim))
        name = type(call.module).__name__ if call.module is not None else getattr(call.function, "__name__", "")
        name = (name or str(call.function)).lower().replace("_", "")
        return log_softmax(call, x, axis) if name.startswith("log") else softmax(call, x, axis, name == "softmin")


def softmax(call: Call, x: Ref, axis: int, negated: bool = False) -> Ref:
    """Steps ``.max .sub .exp .sum .reciprocal .mul`` over ``axis``; ``negated`` is softmin, with ``.min``."""
    exp, total = _exponentials(call, _difference(call, x, axis, negated, _DIFFERENCE), axis)
    inverse = call.emit("unary", [total], {"function": "reciprocal"}, suffix=".reciprocal", format=INT16)
    return call.emit("mul", [exp, inverse], suffix=".mul")


def log_softmax(call: Call, x: Ref, axis: int) -> Ref:
    """Steps ``.max .sub .exp .sum .log .out`` over ``axis``."""
    difference = _difference(call, x, axis, False, INT16)
    _, total = _exponentials(call, difference, axis)
    log = call.emit("unary", [total], {"function": "log"}, suffix=".log", format=INT16)
    return call.emit("sub", [difference, log], suffix=".out")


def _difference(call: Call, x: Ref, axis: int, negated: bool, format: Format) -> Ref:
    sizes: dict[str, Any] = {"axes": [axis], "keepdim": True}
    extreme = call.emit("amin" if negated else "amax", [x], sizes, suffix=".min" if negated else ".max")
    terms = [extreme, x] if negated else [x, extreme]
    return call.emit("sub", terms, suffix=".sub", format=format)


def _exponentials(call: Call, difference: Ref, axis: int) -> tuple[Ref, Ref]:
    exp = call.emit("unary", [difference], {"function": "exp"}, suffix=".exp", format=_EXPONENTIAL)
    sizes = {"axes": [axis], "keepdim": True, "divisor": 1}
    return exp, call.emit("sum", [exp], sizes, suffix=".sum", format=INT16)
