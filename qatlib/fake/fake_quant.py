"""FakeQuantize: quantize and dequantize in float, with a straight-through gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qatlib.errors import TrainingError
from qatlib.fake.distributed import largest, size
from qatlib.fake.learned import LearnedScale
from qatlib.fake.observer import Histogram
from qatlib.fake.qconfig import FakeQuantSpec
from qatlib.fake.state import FakeQuantState, StateCell
from qatlib.fake.straight_through import StraightThrough, round_into
from qatlib.fake.thresholds import kept_of_channels
from qatlib.ops.clamp import Bounds, apply_clamp
from qatlib.ops.masks import relevant
from qatlib.qtype import DEAD, DEAD_SCALE, check_scale, limits, scale_of


def fake_quantize(
    x: Tensor, scale: Tensor, dtype: str, bounds: Bounds | None = None, reuse: bool = False, slack: int = 0
) -> Tensor:
    """``x``, clamped to ``bounds``, rounded to multiples of ``scale`` (broadcast) within the codes of ``dtype``.

    Differentiable in ``x``: the gradient passes where nothing was clamped, or by no more than ``slack`` codes.
    ``reuse`` allows the result to take the memory of ``x`` where no gradient is wanted.
    """
    if reuse and not (torch.is_grad_enabled() and x.requires_grad):
        return round_into(x, x, scale, limits(dtype), bounds)
    out: Tensor = StraightThrough.apply(x, scale, limits(dtype), bounds, slack)  # type: ignore[no-untyped-call]
    return out


def round_to(x: Tensor, unit: Tensor) -> Tensor:
    """``x`` rounded half to even to multiples of ``unit``; the gradient passes."""
    return x + ((x / unit).round() * unit - x).detach()


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


class FakeQuantize(LearnedScale):
    """Fake-quant of one activation, per tensor. What it does is decided by the model's state.

    ``low`` and ``high`` keep the range seen in calibration; ``scale`` is 0 until calibrated, and is the scale whatever
    the kind: a learned one is brought up to date in every forward in QAT, and when the state changes. The codes reach
    down to ``-room`` at least; where masks ask for room, the scale is not learned.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    room: Tensor

    def __init__(
        self, spec: FakeQuantSpec, cell: StateCell, where: str, below_maximum: Sequence[Any] | None = None
    ) -> None:
        """``below_maximum`` says which values are none of the range: :mod:`qatlib.ops.masks`."""
        super().__init__(spec if below_maximum is None else replace(spec, kind="moving_average"))
        self.where, self.below_maximum = where, below_maximum
        self.register_buffer("room", torch.tensor(0.0), persistent=below_maximum is not None)
        self.pass_room: Callable[[float], None] = lambda low: None
        self._cell = cell
        self.histogram = Histogram.of(spec)
        self.register_buffer("scale", torch.tensor(spec.scale or 0.0))
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    @property
    def calibrated(self) -> bool:
        return float(self.scale) > 0

    def forward(
        self, x: Tensor, telling: Tensor | None = None, bounds: Bounds | None = None, reuse: bool = False
    ) -> Tensor:
        """``x`` clamped to ``bounds`` and quantized, as the state says.

        ``telling`` are the elements that count for the scale, default all. ``reuse``: see :func:`fake_quantize`.
        """
        state = self._cell.state
        if state is FakeQuantState.CALIBRATION:
            x = apply_clamp(x, bounds)
            self.histogram.update(self._relevant(x if telling is None else telling), self.where)
            return x
        if state is FakeQuantState.QAT and self.rule is not None:
            self.start(self.scale)
            self.refresh()
            return self.quantize(x, self.learned, self.scale, bounds)
        if state is FakeQuantState.QAT and self.spec.scale is None and self.spec.averaging_constant > 0:
            self._follow(x if telling is None else telling, bounds)
        return fake_quantize(x, self.scale, self.spec.dtype, bounds, reuse)

    def refresh(self) -> None:
        """Bring ``scale`` up to date with what was learned."""
        if self.started:
            self.scale.copy_(self.current())

    def _relevant(self, x: Tensor) -> Tensor:
        return relevant(x.detach(), self.below_maximum)

    def make_room(self, low: float) -> None:
        """Let the codes reach down to ``low``, whatever else the scale is set from."""
        if -low > float(self.room):
            self.room.fill_(-low)
            self.pass_room(low)

    def _follow(self, x: Tensor, bounds: Bounds | None) -> None:
        if x.numel() == 0 and size() == 1:
            return
        if self.below_maximum is not None:
            x, bounds = self._relevant(apply_clamp(x.detach(), bounds)), None
        ends = torch.stack(torch.aminmax(x.detach())) if x.numel() else x.new_zeros(2)
        seen = apply_clamp(ends, bounds).abs().amax()  # a clamp keeps the order
        current = largest(torch.maximum(seen, self.room))
        if not bool(torch.isfinite(current)):
            raise TrainingError(
                "QAT161", self.where, "activation is not finite in training", "Lower qat.lr or set qat.clip_grad_norm"
            )
        qmin, qmax = limits(self.spec.dtype)
        c = self.spec.averaging_constant
        self.scale.mul_(1 - c).add_(c * (current * 2 / (qmax - qmin)).clamp_(min=DEAD_SCALE))

    def forget(self, counting: bool = False) -> None:
        """Drop what earlier calibrations saw; with ``counting`` prepare for settling by any method."""
        self.histogram = Histogram.of(self.spec, counting)
        self.room.zero_()

    def settle(self, spec: FakeQuantSpec | None = None) -> None:
        """Set the scale from the histogram, by ``spec`` (default: its own)."""
        spec = spec or self.spec
        self.restart()
        if self.histogram.low <= self.histogram.high:
            self.low.fill_(self.histogram.low)
            self.high.fill_(self.histogram.high)
        if self.spec.scale is None:
            threshold = max(self.histogram.threshold(spec), float(self.room))
            self.scale.fill_(scale_of(threshold, self.spec.dtype, self.where))

    def extra_repr(self) -> str:
        return f"{self.spec.dtype}, scale={float(self.scale):.6g}" + (", fixed" if self.spec.scale else "")


class ConstantFakeQuantize(FakeQuantize):
    """Fake-quant of a constant tensor: the scale follows its elements, like that of weights, in every state.

    A single number c has code +-64 at scale |c|/64, which is exact.
    """

    def __init__(
        self,
        spec: FakeQuantSpec,
        cell: StateCell,
        where: str,
        value: Tensor,
        below_maximum: Sequence[Any] | None = None,
    ) -> None:
        spec = replace(spec, kind="moving_average")
        spec = replace(spec, dtype="int8", scale=None) if value.dim() == 0 else spec
        super().__init__(spec, cell, where, below_maximum)
        self._measure(value.detach())

    def forward(
        self, x: Tensor, telling: Tensor | None = None, bounds: Bounds | None = None, reuse: bool = False
    ) -> Tensor:
        self._measure(x.detach())
        return fake_quantize(x, self.scale, self.spec.dtype) if self._cell.state.quantizes else x

    def _measure(self, x: Tensor) -> None:
        x = self._relevant(x)
        self.low.copy_(x.min())
        self.high.copy_(x.max())
        largest = max(float(x.abs().max()), float(self.room))
        if x.dim() == 0:
            self.scale.fill_(check_scale(largest / 64, self.where) if largest >= DEAD else DEAD_SCALE)
        elif self.spec.scale is None:
            self.scale.fill_(scale_of(largest, self.spec.dtype, self.where))

    def make_room(self, low: float) -> None:
        super().make_room(low)
        self.scale.clamp_(min=scale_of(float(self.room), self.spec.dtype, self.where))

    def settle(self, spec: FakeQuantSpec | None = None) -> None:
        """Nothing to do: the scale is known from the start."""


class WeightFakeQuantize(LearnedScale):
    """Fake-quant of weights, per output channel; the scale follows the weights: ``2 kept max|w| / (qmax - qmin)``.

    ``kept`` ``[O]`` is 1, or the share of the largest magnitude that calibration found best. ``fixed`` ``[O]`` are
    scales that stay: weights were rounded with them, or a checkpoint of another kind learned them; None, and in no
    state dict, until then. A scale that is learned starts at either, at the first forward in QAT.
    """

    kept: Tensor
    fixed: Tensor | None
    learned_goes_to = "fixed"

    def __init__(self, spec: FakeQuantSpec, channels: int = 1) -> None:
        super().__init__(spec, (channels,))
        self.register_buffer("kept", torch.ones(channels))
        self.register_buffer("fixed", None)

    def settle(self, weight: Tensor) -> None:
        """Choose what is kept of every channel's largest magnitude, by ``spec.method``: min_max keeps all."""
        self.restart()
        if self.spec.method == "mse":
            self.kept.copy_(kept_of_channels(weight.detach(), self.spec.dtype))

    def scales(self, weight: Tensor) -> Tensor:
        """Scale of every output channel, float32 ``[O]``."""
        if self.started:
            return self.current()
        if self.fixed is not None:
            return self.fixed
        qmin, qmax = limits(self.spec.dtype)
        rows = weight.detach().flatten(1)
        largest = torch.maximum(rows.amax(1), -rows.amin(1))
        scale = (largest.double() * self.kept.double() * 2 / (qmax - qmin)).float()
        return torch.where(largest < DEAD, torch.full_like(scale, DEAD_SCALE), scale)

    def quantized(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Fake-quantized weights. What is learned gets a gradient where ``scales`` are its own.

        The largest weight of a channel is half a code above ``qmax``, where its scale comes from it; it is not out of
        range, and without a gradient it would never move.
        """
        over_channels = scales.view(-1, *[1] * (weight.dim() - 1))
        if not (self.started and torch.is_grad_enabled()):
            return fake_quantize(weight, over_channels, self.spec.dtype, slack=1)
        own = torch.where(scales > self.current(), self.learned.detach(), self.learned)
        return self.quantize(weight, own, over_channels)

    def codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Integer weights, section 2 of ``docs/numerics.md``."""
        qmin, qmax = limits(self.spec.dtype)
        scale = scales.view(-1, *[1] * (weight.dim() - 1))
        return (weight.detach() / scale).round_().clamp_(qmin, qmax).to(getattr(torch, self.spec.dtype))

    def _translate(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        super()._translate(state_dict, prefix)
        if f"{prefix}kept" in state_dict:
            self.fixed = torch.empty_like(self.kept) if f"{prefix}fixed" in state_dict else None

    def extra_repr(self) -> str:
        return f"{self.spec.dtype}, per output channel"
