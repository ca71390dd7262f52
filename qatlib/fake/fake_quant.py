"""FakeQuantize: quantize and dequantize in float, with a straight-through gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qatlib.errors import TrainingError
from qatlib.fake.observer import Histogram
from qatlib.fake.qconfig import FakeQuantSpec
from qatlib.fake.state import FakeQuantState, StateCell
from qatlib.qtype import DEAD, DEAD_SCALE, check_scale, limits, scale_of


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


MASKED = -5e3
"""Scores at or below this are masks: -1e4, -1e9, the lowest float."""


def relevant(x: Tensor, below_maximum: Sequence[Any] | None) -> Tensor:
    """``x`` with what lies further below the largest of its row than counts, (axis, distance), raised to there.

    Masks are never the largest; a row of nothing but masks counts as 0.
    """
    if below_maximum is None:
        return x
    axis, distance = below_maximum
    top = x.masked_fill(x <= MASKED, -torch.inf).amax(axis, keepdim=True)
    return torch.where(top > -torch.inf, torch.maximum(x, top - distance), torch.zeros_like(x))


def within_reach(
    f: Callable[[Tensor], Tensor], x: Tensor, observed: tuple[float, float] | None, scale: Tensor
) -> Tensor:
    """``f(x)`` for a function with poles, such as log, on values in codes of ``scale``.

    Where f is not finite it is taken at the nearest end of the calibrated range ``observed``, as the table will be
    (section 4 of ``docs/numerics.md``, Tables). Where its slope is not finite, as of sqrt at 0, no gradient passes.
    """
    if observed is not None and observed[0] < observed[1]:
        low, high = (scale.new_tensor(end) for end in observed)
        quantized = ((end / scale).round() * scale for end in (low, high))
        wide = tuple(
            pick(a, b) for pick, a, b in zip((torch.minimum, torch.maximum), (low, high), quantized, strict=True)
        )
        for first, last in (wide, (low, high)):
            x = torch.where(torch.isfinite(f(x.detach())), x, torch.clamp(x, first, last))
    if not x.requires_grad:
        return f(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = f(leaf)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
    passed = torch.where(torch.isfinite(slope), slope, torch.zeros_like(slope))
    return y.detach() + (x - x.detach()) * passed


class FakeQuantize(nn.Module):
    """Fake-quant of one activation, per tensor. What it does is decided by the model's state.

    ``low`` and ``high`` keep the range seen in calibration; ``scale`` is 0 until calibrated.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, spec: FakeQuantSpec, cell: StateCell, where: str, below_maximum: tuple[int, float] | None = None
    ) -> None:
        """``below_maximum`` (axis, distance): values further below the largest of their row are none of the range.

        A softmax takes them for 0 anyway; masks of -1e4 would otherwise leave no codes for the rest.
        """
        super().__init__()
        self.spec, self.where, self.below_maximum = spec, where, below_maximum
        self._cell = cell
        self.histogram = Histogram(spec.bins)
        self.register_buffer("scale", torch.tensor(spec.scale or 0.0))
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    @property
    def calibrated(self) -> bool:
        return float(self.scale) > 0

    def forward(self, x: Tensor, telling: Tensor | None = None) -> Tensor:
        """``x`` quantized, as the state says; ``telling`` are the elements that count for the scale, default all."""
        state = self._cell.state
        seen = x.detach() if telling is None else telling.detach()
        if state is FakeQuantState.CALIBRATION:
            self.histogram.update(self._relevant(seen), self.where)
            return x
        if state is FakeQuantState.QAT and self.spec.scale is None and self.spec.averaging_constant > 0:
            self._follow(self._relevant(seen))
        return fake_quantize(x, self.scale, self.spec.dtype)

    def _relevant(self, x: Tensor) -> Tensor:
        return relevant(x, self.below_maximum)

    def _follow(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x)
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


class ConstantFakeQuantize(FakeQuantize):
    """Fake-quant of a constant tensor: the scale follows its elements, like that of weights, in every state.

    A single number c has code +-64 at scale |c|/64, which is exact.
    """

    def __init__(self, spec: FakeQuantSpec, cell: StateCell, where: str, value: Tensor) -> None:
        spec = replace(spec, dtype="int8", scale=None) if value.dim() == 0 else spec
        super().__init__(spec, cell, where)
        self._measure(value.detach())

    def forward(self, x: Tensor, telling: Tensor | None = None) -> Tensor:
        self._measure(x.detach())
        return fake_quantize(x, self.scale, self.spec.dtype) if self._cell.state.quantizes else x

    def _measure(self, x: Tensor) -> None:
        self.low.copy_(x.min())
        self.high.copy_(x.max())
        largest = float(x.abs().max())
        if x.dim() == 0:
            self.scale.fill_(check_scale(largest / 64, self.where) if largest >= DEAD else DEAD_SCALE)
        elif self.spec.scale is None:
            self.scale.fill_(scale_of(largest, self.spec.dtype, self.where))

    def settle(self, spec: FakeQuantSpec | None = None) -> None:
        """Nothing to do: the scale is known from the start."""


class WeightFakeQuantize(nn.Module):
    """Fake-quant of weights, per output channel; the scale follows the weights: ``2 max|w| / (qmax - qmin)``.

    ``fixed`` ``[O]`` are scales that stay, for weights that were rounded with them; None, and in no state dict, until
    then.
    """

    fixed: Tensor | None

    def __init__(self, spec: FakeQuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("fixed", None)

    def scales(self, weight: Tensor) -> Tensor:
        """Scale of every output channel, float32 ``[O]``."""
        if self.fixed is not None:
            return self.fixed
        qmin, qmax = limits(self.spec.dtype)
        largest = weight.detach().abs().flatten(1).amax(1)
        scale = (largest.double() * 2 / (qmax - qmin)).float()
        return torch.where(largest < DEAD, torch.full_like(scale, DEAD_SCALE), scale)

    def quantized(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Fake-quantized weights."""
        return fake_quantize(weight, scales.view(-1, *[1] * (weight.dim() - 1)), self.spec.dtype)

    def codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Integer weights, section 2 of ``docs/numerics.md``."""
        qmin, qmax = limits(self.spec.dtype)
        scale = scales.view(-1, *[1] * (weight.dim() - 1))
        return (weight.detach() / scale).round_().clamp_(qmin, qmax).to(getattr(torch, self.spec.dtype))

    def extra_repr(self) -> str:
        return f"{self.spec.dtype}, per output channel"
