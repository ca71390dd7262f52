"""Rounding to codes with a straight-through gradient, written for caches: values stay in one piece of memory at a time.

A tensor that leaves the cache between two elementwise operations costs more than the operations; so does memory never
touched before. Everything here therefore goes piece by piece, and keeps the input instead of masks: a comparison into
truth values is slower than the division.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qatlib.ops.clamp import Bounds

_PIECE = 2**17
"""Elements that a thread works on: half a MiB of float32."""
gate = torch.ops.aten.hardtanh_backward.grad_input
"""``gate(upstream, x, low, high, grad_input=out)``: upstream where ``low < x < high``, else 0."""


def pieces(*tensors: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of every tensor, and their ``scale``, piece by piece.

    The tensors have one shape; ``scale`` is a single number, or one per position of the first axis. What is laid out
    in some other way, and what is on a GPU, comes in one piece.
    """
    first = tensors[0]
    size = _PIECE * torch.get_num_threads()
    alike = all(t.stride() == first.stride() for t in tensors)
    if first.device.type != "cpu" or first.numel() <= size or not (alike and _dense(first)):
        yield (*tensors, scale)
    elif scale.numel() == 1:
        flat = (torch.split(t.as_strided((t.numel(),), (1,)), size) for t in tensors)
        for parts in zip(*flat, strict=True):
            yield (*parts, scale.reshape(()))
    elif scale.dim() == first.dim() and scale.shape[0] == scale.numel():
        rows = max(1, size * len(first) // first.numel())
        yield from zip(*(torch.split(t, rows) for t in (*tensors, scale)), strict=True)
    else:
        yield (*tensors, scale)


def _dense(x: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once: in row-major order or channels last."""
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])]
    return any(x.is_contiguous(memory_format=form) for form in formats)


def round_into(out: Tensor, x: Tensor, scale: Tensor, limits: tuple[int, int], bounds: Bounds | None) -> Tensor:
    """``clamp(rne(x / scale), *limits) * scale`` of ``x`` clamped to ``bounds``, written to ``out``, which may be x."""
    for source, target, unit in pieces(x, out, scale=scale):
        if bounds is not None:
            source = torch.clamp(source, *bounds, out=target)
        torch.div(source, unit, out=target).round_().clamp_(*limits).mul_(unit)
    return out


def gate_bounds(bounds: Bounds, dtype: torch.dtype) -> tuple[float, float]:
    """Ends of the open interval of ``x`` where the gradient of that clamp passes: for relu above 0, else ends too."""
    low, high = bounds
    if low == 0 and high is None:
        return 0.0, math.inf
    ends = torch.tensor([-math.inf if low is None else low, math.inf if high is None else high], dtype=dtype)
    below, above = torch.nextafter(ends, torch.tensor([-math.inf, math.inf], dtype=dtype)).tolist()
    return below, above


class StraightThrough(torch.autograd.Function):
    """:func:`round_into` a new tensor. The gradient passes where neither ``bounds`` nor ``limits`` clamped.

    ``slack`` is how many codes beyond ``limits`` still count as inside.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, limits: tuple[int, int], bounds: Bounds | None, slack: int
    ) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
            ctx.scale, ctx.bounds = scale.clone(), bounds  # the scale may move before backward
            ctx.limits = limits[0] - slack, limits[1] + slack
        return round_into(torch.empty_like(x, dtype=torch.result_type(x, scale)), x, scale, limits, bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is differentiated again
            return grads[0] * passes(x, ctx.scale, ctx.limits, ctx.bounds), None, None, None, None
        qmin, qmax = ctx.limits
        edges = None if ctx.bounds is None else gate_bounds(ctx.bounds, x.dtype)
        passed = torch.empty_like(x, dtype=grads[0].dtype)
        for source, grad, target, unit in pieces(x, grads[0], passed, scale=ctx.scale):
            codes = torch.div(source, unit).round_()
            gate(grad, codes, qmin - 0.5, qmax + 0.5, grad_input=target)
            if edges is not None:
                gate(target, source, *edges, grad_input=target)
        return passed, None, None, None, None


def passes(x: Tensor, scale: Tensor, limits: tuple[int, int], bounds: Bounds | None) -> Tensor:
    """Where the gradient passes, as truth values."""
    codes = (x / scale).round()
    inside = (codes >= limits[0]) & (codes <= limits[1])
    if bounds is None:
        return inside
    below, above = gate_bounds(bounds, x.dtype)
    return inside & (x > below) & (x < above)
