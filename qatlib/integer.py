"""Exact integer arithmetic on float carriers: section 6 of ``docs/numerics.md``.

Codes and accumulators travel as float32 or float64 tensors of integers. A route is taken only where a bound proves that
every partial result is representable, so that the order of summation, the number of threads and the batch size cannot
change a bit.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qatlib.errors import ProgramError

EXACT_FLOAT32 = 2**24
EXACT_FLOAT64 = 2**53
INT32 = (-(2**31), 2**31 - 1)
_CHUNK = 1 << 18
"""Elements of one requantization step: its float64 buffers of 2 MiB stay in a last-level cache, and torch cuts it among
threads. Measured on two AVX2 cores against 24,576 elements, which one thread does alone: 0.78 to 0.86 of the time."""

Route = str
_X86 = platform.machine().lower() in ("x86_64", "amd64")


# -- where float kernels sum exactly -----------------------------------------------------------------------------------


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Switch off every float kernel that does not sum plain products: TF32, reduced precision, autocast, NNPACK."""
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        mkldnn: Any = torch.backends.mkldnn
        for backend in (mkldnn.conv, mkldnn.matmul):
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def convolution_is_direct(device: torch.device) -> bool:
    """Whether torch's float convolution on ``device`` is known to sum plain products.

    On x86-64 oneDNN is asked for the direct algorithm. cuDNN and the Arm library choose Winograd by themselves; there
    the emulator multiplies matrices of patches instead.
    """
    return device.type == "cpu" and _X86


def _patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """``[N, C, *in]`` to ``[N, C, *out, *kernel]``, a view."""
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
    return x


@dataclass(frozen=True)
class Geometry:
    """Of a convolution: one entry per spatial axis; ``padding`` is (before, after)."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def symmetric(self) -> bool:
        return all(before == after for before, after in self.padding)


def pad(x: Tensor, padding: Sequence[Sequence[int]], value: float = 0.0) -> Tensor:
    """Pad the trailing axes of ``x`` by (before, after) pairs given in the order of the axes."""
    if not any(size for pair in padding for size in pair):
        return x
    return F.pad(x, [size for pair in reversed(padding) for size in pair], value=value)


def float_convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """torch's own convolution with padding per side; 1 to 3 spatial axes.

    Dilated convolutions get their padding beforehand: with torch 2.13 on AVX2, oneDNN's kernel for padded, dilated,
    channels-last input reads outside its buffers.
    """
    conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    padding: tuple[int, ...] | int = tuple(before for before, _ in geometry.padding)
    if not geometry.symmetric or max(geometry.dilation) > 1:
        x, padding = pad(x, geometry.padding), 0
    return conv(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolution as plain sums of products in the dtype of ``x``."""
    if convolution_is_direct(x.device):
        return float_convolve(x, weight, bias, geometry)
    axes, groups = weight.dim() - 2, geometry.groups
    x, stride, dilation = pad(x, geometry.padding), geometry.stride, geometry.dilation
    patches = _patches(x, weight.shape[2:], stride, dilation)
    batch, out = x.shape[0], patches.shape[2 : 2 + axes]
    columns = patches.reshape(batch, groups, x.shape[1] // groups, math.prod(out), -1)
    columns = columns.transpose(2, 3).flatten(3)
    rows = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    acc = (columns @ rows).transpose(2, 3).reshape(batch, weight.shape[0], *out)
    return acc if bias is None else acc + bias.view(-1, *[1] * axes)


# -- sums of products --------------------------------------------------------------------------------------------------

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x, weight, bias) -> acc`` in the dtype of its arguments."""


# -- requantization ----------------------------------------------------------------------------------------------------


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^exponent`` in float64, exact, of whole ``exponent`` in [-1022, 1023]: the bits of that number.

    CUDA's ``pow(2, -4)`` is an ulp beside 1/16, and a product with it beside a half rounds to another code.
    """
    return ((exponent.long() + 1023) << 52).view(torch.float64)


@dataclass(frozen=True)
class Requantizer:
    """``clamp(rne(sum(term_i * M_i) / 2^n), lo, hi)`` for one or two terms.

    ``factors`` are the ``M_i / 2^n`` in float64, broadcast against the terms. Products stay below 2^53 units of 2^-n,
    so float64 evaluates them exactly. The work is cut into pieces that stay in cache, where float64 costs no
    more than float32 with a test for products next to a half. ``lo`` and ``hi`` are codes of at most 16 bits.
    """

    factors: tuple[Tensor, ...]
    lo: int
    hi: int
    identity: bool

    @classmethod
    def plan(cls, multipliers: Sequence[Tensor], shift: Tensor, bounds: Sequence[int], lo: int, hi: int) -> Requantizer:
        """``bounds`` are the largest absolute values of the terms; ``multipliers`` and ``shift`` integer tensors.

        Raises ProgramError (QAT176) if a sum may reach 2^53.
        """
        total = sum(bound * int(m.abs().max()) for bound, m in zip(bounds, multipliers, strict=True))
        if total >= EXACT_FLOAT64:
            raise ProgramError("QAT176", "requantize", f"a product may reach {total}, beyond 2^53", "Convert again")
        power = power_of_two(-shift)
        factors = tuple(m.double() * power for m in multipliers)
        identity = len(factors) == 1 and bool((factors[0] == 1).all()) and lo <= -bounds[0] and hi >= bounds[0]
        return cls(factors, lo, hi, identity)

    def __call__(self, *terms: Tensor, reuse: bool = False) -> Tensor:
        """Codes in float32. Terms have the same number of axes. ``reuse`` lets a float32 first term be overwritten."""
        if self.identity:
            return terms[0].float()
        return self._swept(terms, reuse and terms[0].dtype == torch.float32, multiply=False)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``clamp(rne(a * b * M / 2^n), lo, hi)``: codes in float32 of one term that is a product, never stored."""
        return self._swept((a, b), overwrite=False, multiply=True)

    def _swept(self, terms: Sequence[Tensor], overwrite: bool, multiply: bool) -> Tensor:
        shape: tuple[int, ...] = terms[0].shape
        if len(terms) > 1 and terms[1].shape != shape:
            shape = np.broadcast_shapes(tuple(shape), tuple(terms[1].shape))
        if math.prod(shape) <= _CHUNK:
            return self._at_once(terms, multiply)
        terms = [t.expand(shape) for t in terms]
        factors = [f.expand(shape) for f in self.factors]
        out = terms[0] if overwrite else torch.empty_like(terms[0], dtype=torch.float32)
        buffers: list[Tensor] = []
        for axis, start, size in pieces(out):
            parts = [t.narrow(axis, start, size) for t in terms]
            buffers = buffers or [torch.empty_like(part, dtype=torch.float64) for part in parts]
            total, *other = (b.narrow(axis, 0, size).copy_(part) for b, part in zip(buffers, parts, strict=True))
            first, *second = (f.narrow(axis, start, size) for f in factors)
            if multiply:
                total.mul_(other[0])
            total.mul_(first)
            if second:
                total.addcmul_(other[0], second[0])
            # What float32 rounds here is beyond 2^24, and so beyond the limits of any code.
            out.narrow(axis, start, size).copy_(total.round_()).clamp_(self.lo, self.hi)
        return out

    def _at_once(self, terms: Sequence[Tensor], multiply: bool) -> Tensor:
        """The same of one piece: where there is little to compute, cutting it takes longer than that."""
        first, *second = self.factors
        a, *other = (term.double() for term in terms)
        total = a * other[0] * first if multiply else a * first
        if second:
            total = torch.addcmul(total, other[0], second[0])
        return total.round_().clamp_(self.lo, self.hi).float()


def pieces(x: Tensor) -> Iterator[tuple[int, int, int]]:
    """(axis, start, size) of narrow views of ``x`` that cover it, each a stretch of memory that stays in cache.

    A GPU takes ``x`` in one piece.
    """
    axis = max(range(x.dim()), key=lambda i: (x.shape[i] > 1, x.stride(i)))
    whole = x.shape[axis]
    size = max(1, _CHUNK * whole // max(1, x.numel())) if x.device.type == "cpu" else max(1, whole)
    for start in range(0, whole, size):
        yield axis, start, min(size, whole - start)
