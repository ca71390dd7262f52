"""What to say about an operator that has no integer form."""

from __future__ import annotations

from collections.abc import Sequence

from qatlib.errors import GraphError
from qatlib.ops.base import BY_NAME

_RELU = "nn.ReLU or nn.ReLU6"
_BOUNDED = "nn.Hardtanh or nn.ReLU6, or run it after the outputs"
_NORM = "nn.BatchNorm2d, which folds into the convolution"
_POOL = "nn.MaxPool2d, nn.AvgPool2d or nn.AdaptiveAvgPool2d"
_AFTER = "run it after the outputs"
_CONSTANT = "fold the factor into the weights of a layer next to it"
_PRODUCT = "nn.Linear or nn.Conv2d with constant weights"
_PIECES = "one layer per piece in place of a layer that is cut"

_NEAREST = {
    _RELU: "gelu silu swish hardswish mish elu celu selu leakyrelu prelu rrelu softplus softsign glu threshold",
    _BOUNDED: "sigmoid hardsigmoid logsigmoid tanh expit",
    _AFTER: "softmax logsoftmax softmin softmax2d argmax topk exp log upsample interpolate gridsample pixelshuffle",
    _NORM: "layernorm groupnorm rmsnorm instancenorm1d instancenorm2d instancenorm3d localresponsenorm normalize norm",
    "nn.AdaptiveAvgPool2d(1)": "mean",
    "nn.AdaptiveMaxPool2d(1)": "amax max",
    _POOL: "lppool1d lppool2d fractionalmaxpool2d adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d",
    "nn.Conv2d": "convtranspose1d convtranspose2d convtranspose3d lazyconv2d unfold fold",
    _CONSTANT: "mul truediv div",
    "add, with the sign folded into the weights": "sub neg",
    _PRODUCT: "matmul bmm einsum mm bilinear",
    _PIECES: "chunk split getitem unbind narrow",
    "the padding argument of the convolution or pool": "pad zeropad2d reflectionpad2d replicationpad2d",
    "convolutions over time": "lstm gru rnn",
}
_BY_NAME = {word: way for way, words in _NEAREST.items() for word in words.split()}


def nearest(type_name: str) -> str:
    """The supported way closest to a type such as ``torch.nn.modules.activation.GELU``; empty if none is."""
    return _BY_NAME.get(type_name.rpartition(".")[2].lower().replace("_", ""), "")


def unsupported(missing: Sequence[tuple[str, str, str]]) -> GraphError:
    """One error for all unsupported calls, given as (name, type, source line)."""
    lines = []
    for name, type_name, where in missing:
        near = nearest(type_name)
        at = f" at {where}" if where else ""
        short = type_name.removeprefix("torch.nn.modules.")
        lines.append(f"{name} ({short}){at}" + (f", nearest: {near}" if near else ""))
    known = ", ".join(sorted(BY_NAME))
    count = "1 operator has" if len(missing) == 1 else f"{len(missing)} operators have"
    return GraphError(
        "QAT132",
        "model",
        f"{count} no integer form: " + "; ".join(lines),
        f"Replace them (supported: {known}), or move them into a function after the outputs",
    )
