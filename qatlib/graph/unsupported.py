"""What to say about an operator that has no integer form."""

from __future__ import annotations

from collections.abc import Sequence

from qatlib.errors import GraphError
from qatlib.ops.base import BY_NAME

_NEAREST = {
    "nn.LeakyReLU": "rrelu",
    "a split along the channels, torch.sigmoid and a product": "glu",
    "nn.BatchNorm2d, which folds into the convolution": "localresponsenorm crossmaplrn2d",
    "nn.MaxPool2d, nn.AvgPool2d or nn.AdaptiveAvgPool2d": "lppool1d lppool2d fractionalmaxpool2d fractionalmaxpool3d",
    "F.interpolate or nn.ConvTranspose2d": "maxunpool1d maxunpool2d maxunpool3d fold",
    "nn.Linear of both inputs joined": "bilinear",
    "F.normalize of both, their product and its sum": "cosinesimilarity",
    "a product with a triangular matrix of ones": "cumsum",
    "torch.gather or torch.where": "scatter scatteradd indexadd indexput indexfill maskedselect maskedscatter",
    "run it after the outputs": "nonzero unique bincount histc multinomial quantile median mode kthvalue",
    "a convolution whose weights are the filter": "fft rfft ifft irfft stft",
    "a product of the factors, or the sum of their logarithms": "prod cumprod",
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
