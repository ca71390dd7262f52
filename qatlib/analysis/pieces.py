"""Tensors in pieces that stay in cache, each measured once for whatever asks: extent, sums, codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qatlib.qtype import QType

_PIECE, _PIECE_CUDA = 2**17, 2**24
"""Elements: half a MiB, of which a few stay in cache; float32 counts to 2^24."""


@dataclass(frozen=True)
class Coded:
    """Real numbers as codes of a format with ``scale``; ``codes`` is a float tensor of whole numbers."""

    codes: Tensor
    scale: float

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


def real(x: Tensor | Coded) -> Tensor:
    """The numbers themselves; of codes float32."""
    return x.codes.float() * x.scale if isinstance(x, Coded) else x


class Piece:
    """A part of a tensor, flat and small enough to stay in cache; each property is computed when it is first read.

    What is summed of float32 is good to about five digits; counts are exact.
    """

    def __init__(self, values: Tensor, qtype: QType, codes: Tensor | None = None) -> None:
        """``codes``: those of ``values`` in ``qtype`` where they are known."""
        self.values, self.count, self._qtype = values, values.numel(), qtype
        if codes is not None:
            self.codes, self.saturated = codes, 0

    @cached_property
    def extent(self) -> tuple[float, float]:
        """Least and largest element."""
        low, high = self.values.aminmax()
        return float(low), float(high)

    @cached_property
    def magnitude(self) -> float:
        """Largest absolute value; whoever knows a bound of it may set that instead."""
        return max(map(abs, self.extent))

    @cached_property
    def squarable(self) -> Tensor:
        """The values, as float64 where float32 does not hold the sum of their squares."""
        return self.values if squares_fit(self.magnitude) else self.values.double()

    @cached_property
    def sq(self) -> float:
        """Sum of squares."""
        return float(self.squarable.dot(self.squarable))

    @cached_property
    def moments(self) -> tuple[float, float]:
        """Mean, and the sum of squared deviations from it."""
        mean = float(self.squarable.sum()) / self.count
        m2 = self.sq - self.count * mean * mean
        if m2 > self.count * mean * mean:
            return mean, m2
        pivot = float(self.squarable.new_tensor(mean))
        centred = self.squarable.sub(pivot)  # else the difference has lost digits
        off = float(centred.sum()) / self.count
        return pivot + off, max(0.0, float(centred.dot(centred)) - self.count * off * off)

    @cached_property
    def codes(self) -> Tensor:
        """By numerics.md, section 2; raises ValueError for a format without a scale."""
        return self._rounded.clamp(*self._qtype.limits) if self._may_saturate else self._rounded

    @cached_property
    def saturated(self) -> int:
        """How many elements lie outside of the format."""
        if not self._may_saturate:
            return 0
        return int((self._rounded - self.codes).abs_().clamp_(max=1).sum())  # faster than counting truth values

    @cached_property
    def _rounded(self) -> Tensor:
        if self._qtype.scale is None:
            raise ValueError("codes of a format without a scale")
        return self.values.float().div(torch.tensor(self._qtype.scale, device=self.values.device)).round_()

    @cached_property
    def _may_saturate(self) -> bool:
        return self._qtype.scale is not None and self.magnitude / self._qtype.scale > self._qtype.limits[1] + 0.4

    def sample(self, start: int, step: int) -> Piece:
        """Every ``step``-th element from ``start`` on."""
        codes = self.codes[start::step] if "codes" in self.__dict__ else None
        return Piece(self.values[start::step], self._qtype, codes)


def squares_fit(magnitude: float) -> bool:
    """Whether float32 holds sums of squares of numbers up to ``magnitude``, and of errors that are small beside it."""
    return magnitude == 0.0 or 1e-12 < magnitude < 1e16


def pieces(qtype: QType, *tensors: Tensor | Coded) -> Iterator[tuple[Piece, ...]]:
    """The same elements of every tensor, in float32, or in float64 where one is float64 or holds integers.

    The codes of what is :class:`Coded` are taken as those in ``qtype``.
    """
    scales = [x.scale if isinstance(x, Coded) else None for x in tensors]
    flat = _flat([(x.codes if isinstance(x, Coded) else x).detach() for x in tensors])
    wide = any(x.dtype in (torch.float64, torch.int64, torch.int32) for x in flat)
    size = _PIECE if flat[0].device.type == "cpu" else _PIECE_CUDA
    for start in range(0, flat[0].numel(), size):
        parts = [x[start : start + size].to(torch.float64 if wide else torch.float32) for x in flat]
        yield tuple(
            Piece(part, qtype) if scale is None else Piece(part * scale, qtype, part)
            for part, scale in zip(parts, scales, strict=True)
        )


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    """Flattened alike, in the order of memory that most of them have: those are not copied."""
    strides, _ = Counter(tensor.stride() for tensor in tensors).most_common(1)[0]
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    return [tensor.permute(order).flatten() for tensor in tensors]
