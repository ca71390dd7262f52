"""What to say about an operator that has no integer form."""

from __future__ import annotations

from collections.abc import Sequence

from qatlib.errors import GraphError
from qatlib.ops.base import BY_NAME

_NEAREST = {
    "activation": "nn.ReLU or nn.ReLU6",
    "pooling": "nn.MaxPool2d, nn.AvgPool2d or nn.AdaptiveAvgPool2d",
    "normalization": "nn.BatchNorm2d, which folds into the convolution",
    "instancenorm": "nn.BatchNorm2d, which folds into the convolution",
    "conv": "nn.Conv2d",
    "upsampling": "a layer that runs after the outputs",
    "rnn": "convolutions over time",
}


def nearest(type_name: str) -> str:
    """The supported way that comes closest to a module such as ``torch.nn.modules.activation.GELU``."""
    family = type_name.split(".")[-2] if "." in type_name else ""
    return _NEAREST.get(family, "")


def unsupported(missing: Sequence[tuple[str, str, str]]) -> GraphError:
    """One error for all unsupported calls, given as (name, type, source line)."""
    lines = []
    for name, type_name, where in missing:
        near = nearest(type_name)
        at = f" at {where}" if where else ""
        lines.append(f"{name} ({type_name.removeprefix('torch.nn.modules.')}){at}" + (f", nearest: {near}" if near else ""))
    known = ", ".join(sorted(BY_NAME))
    return GraphError(
        "QAT132",
        "model",
        f"{len(missing)} operators have no integer form: " + "; ".join(lines),
        f"Replace them (supported: {known}), or move them into a function after the outputs",
    )
