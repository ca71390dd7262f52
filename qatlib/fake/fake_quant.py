"""FakeQuantize: quantize and dequantize in float, with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatlib.errors import TrainingError
from qatlib.fake.observer import Histogram
from qatlib.fake.qconfig import FakeQuantSpec
from qatlib.fake.state import FakeQuantState, StateCell
from qatlib.qtype import DEAD_SCALE, limits, scale_of


class _StraightThrough(torch.autograd.Function):
    """``clamp(rne(x / scale), qmin, qmax) * scale``; the gradient passes where nothing was clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        codes = (x / scale).round_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((codes >= qmin) & (codes <= qmax))
        return codes.clamp_(qmin, qmax).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """``x`` rounded to multiples of ``scale`` (broadcast) within the codes of ``dtype``; differentiable in ``x``."""
    qmin, qmax = limits(dtype)
    out: Tensor = _StraightThrough.apply(x, scale, qmin, qmax)  # type: ignore[no-untyped-call]
    return out


def round_to(x: Tensor, unit: Tensor) -> Tensor:
    """``x`` rounded half to even to multiples of ``unit``; the gradient passes."""
    return x + ((x / unit).round() * unit - x).detach()


class FakeQuantize(nn.Module):
    """Fake-quant of one activation, per tensor. What it does is decided by the model's state.

    ``low`` and ``high`` keep the range seen in calibration; ``scale`` is 0 until calibrated.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, spec: FakeQuantSpec, cell: StateCell, where: str) -> None:
        super().__init__()
        self.spec, self.where = spec, where
        self._cell = cell
        self.histogram = Histogram(spec.bins)
        self.register_buffer("scale", torch.tensor(spec.scale or 0.0))
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    @property
    def calibrated(self) -> bool:
        return float(self.scale) > 0

    def forward(self, x: Tensor) -> Tensor:
        state = self._cell.state
        if state is FakeQuantState.CALIBRATION:
            self.histogram.update(x, self.where)
            return x
        if state is FakeQuantState.QAT and self.spec.scale is None and self.spec.averaging_constant > 0:
            self._follow(x)
        return fake_quantize(x, self.scale, self.spec.dtype)

    def _follow(self, x: Tensor) -> None:
        low, high = torch.aminmax(x.detach())
        current = torch.maximum(-low, high)
        if not bool(torch.isfinite(current)):
            raise TrainingError(
                "QAT161", self.where, "activation is not finite in training", "Lower qat.lr or set qat.clip_grad_norm"
            )
        qmin, qmax = limits(self.spec.dtype)
        c = self.spec.averaging_constant
        self.scale.mul_(1 - c).add_(c * (current * 2 / (qmax - qmin)).clamp_(min=DEAD_SCALE))

    def forget(self) -> None:
        """Drop what earlier calibrations saw."""
        self.histogram = Histogram(self.spec.bins)

    def settle(self, spec: FakeQuantSpec | None = None) -> None:
        """Set the scale from the histogram, by ``spec`` (default: its own)."""
        spec = spec or self.spec
        if self.histogram.low <= self.histogram.high:
            self.low.fill_(self.histogram.low)
            self.high.fill_(self.histogram.high)
        if self.spec.scale is None:
            self.scale.fill_(scale_of(self.histogram.threshold(spec), self.spec.dtype, self.where))

    def extra_repr(self) -> str:
        return f"{self.spec.dtype}, scale={float(self.scale):.6g}" + (", fixed" if self.spec.scale else "")


class WeightFakeQuantize(nn.Module):
    """Fake-quant of weights, per output channel; the scale follows the weights: ``2 max|w| / (qmax - qmin)``."""

    def __init__(self, spec: FakeQuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def scales(self, weight: Tensor) -> Tensor:
        """Scale of every output channel, float32 ``[O]``."""
        qmin, qmax = limits(self.spec.dtype)
        largest = weight.detach().abs().flatten(1).amax(1)
        scale = (largest.double() * 2 / (qmax - qmin)).float()
        return torch.where(largest == 0, torch.full_like(scale, DEAD_SCALE), scale)

    def quantized(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Fake-quantized weights."""
        return fake_quantize(weight, scales.view(-1, *[1] * (weight.dim() - 1)), self.spec.dtype)

    def codes(self, weight: Tensor) -> Tensor:
        """Integer weights, section 2 of ``docs/numerics.md``."""
        qmin, qmax = limits(self.spec.dtype)
        scale = self.scales(weight).view(-1, *[1] * (weight.dim() - 1))
        return (weight.detach() / scale).round_().clamp_(qmin, qmax).to(torch.int8)

    def extra_repr(self) -> str:
        return f"{self.spec.dtype}, per output channel"
