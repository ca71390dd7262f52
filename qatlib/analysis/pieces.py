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


@dataclass(frozen=True)
class OnGrid:
    """Real numbers that are whole multiples of ``scale``."""

    values: Tensor
    scale: float

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def real(x: Tensor | Coded) -> Tensor:
    """The numbers themselves; of codes float32."""
    return x.codes.float() * x.scale if isinstance(x, Coded) else x


class Piece:
    """A part of a tensor, flat and small enough to stay in cache; each property is computed when it is first read.

    Elements are stored as multiples of ``unit``, and everything is summed of those: of codes their scale, else 1. What
    is summed of float32 is good to about five digits; counts, and sums of codes that float32 holds, are exact.
    """

    def __init__(self, stored: Tensor, qtype: QType, unit: float = 1.0, codes: Tensor | None = None) -> None:
        """``codes``: those of the elements in ``qtype`` where they are known."""
        self.stored, self.count, self.unit, self._qtype = stored, stored.numel(), unit, qtype
        if codes is not None:
            self.codes, self.saturated = codes, 0

    @property
    def is_coded(self) -> bool:
        """Whether what is stored are codes."""
        return self.__dict__.get("codes") is self.stored

    @cached_property
    def extent(self) -> tuple[float, float]:
        """Least and largest element."""
        low, high = self.stored.aminmax()
        return float(low) * self.unit, float(high) * self.unit

    @cached_property
    def magnitude(self) -> float:
        """Largest absolute value; whoever knows a bound of it may set that instead."""
        return max(map(abs, self.extent))

    @cached_property
    def squarable(self) -> Tensor:
        """What is stored, as float64 where float32 does not hold the sum of their squares."""
        return self.stored if squares_fit(self.magnitude / self.unit) else self.stored.double()

    @cached_property
    def sq(self) -> float:
        """Sum of squares."""
        return float(self.squarable.dot(self.squarable)) * self.unit**2

    @cached_property
    def moments(self) -> tuple[float, float]:
        """Mean, and the sum of squared deviations from it."""
        mean = float(self.squarable.sum()) * self.unit / self.count
        m2 = self.sq - self.count * mean * mean
        if m2 > self.count * mean * mean:
            return mean, m2
        pivot = float(self.squarable.new_tensor(mean / self.unit))
        centred = self.squarable.sub(pivot)  # else the difference has lost digits
        off = float(centred.sum()) / self.count
        squares = max(0.0, float(centred.dot(centred)) - self.count * off * off)
        return (pivot + off) * self.unit, squares * self.unit**2

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
        return rounded(self.stored.float(), self._qtype.scale)

    @cached_property
    def _may_saturate(self) -> bool:
        return self._qtype.scale is not None and self.magnitude / self._qtype.scale > self._qtype.limits[1] + 0.4

    def sample(self, start: int, step: int) -> Piece:
        """Every ``step``-th element from ``start`` on."""
        part = self.stored[start::step]
        if self.is_coded:
            return Piece(part, self._qtype, self.unit, part)
        return Piece(part, self._qtype, codes=self.codes[start::step] if "codes" in self.__dict__ else None)


def rounded(values: Tensor, scale: float) -> Tensor:
    """Nearest whole multiples of ``scale``, in float32."""
    return values.div(torch.tensor(scale, device=values.device)).round_()


def squares_fit(magnitude: float) -> bool:
    """Whether float32 holds sums of squares of numbers up to ``magnitude``, and of errors that are small beside it."""
    return magnitude == 0.0 or 1e-12 < magnitude < 1e16


def pieces(qtype: QType, *tensors: Tensor | Coded | OnGrid) -> Iterator[tuple[Piece, ...]]:
    """The same elements of every tensor, in float32, or in float64 where one is float64 or holds integers.

    What is :class:`Coded` or :class:`OnGrid` has the scale of ``qtype``. Where all have, elements are codes.
    """
    coded = all(isinstance(x, Coded | OnGrid) for x in tensors)
    flat = _flat([_tensor(x).detach() for x in tensors])
    wide = any(x.dtype in (torch.float64, torch.int64, torch.int32) for x in flat)
    size = _PIECE if flat[0].device.type == "cpu" else _PIECE_CUDA
    for start in range(0, flat[0].numel(), size):
        parts = [x[start : start + size].to(torch.float64 if wide else torch.float32) for x in flat]
        yield tuple(_piece(x, part, qtype, coded) for x, part in zip(tensors, parts, strict=True))


def _tensor(x: Tensor | Coded | OnGrid) -> Tensor:
    if isinstance(x, Tensor):
        return x
    return x.codes if isinstance(x, Coded) else x.values


def _piece(x: Tensor | Coded | OnGrid, part: Tensor, qtype: QType, coded: bool) -> Piece:
    if isinstance(x, Coded):
        return Piece(part, qtype, x.scale, part) if coded else Piece(part * x.scale, qtype, codes=part)
    if isinstance(x, OnGrid) and coded:
        codes = rounded(part, x.scale)
        return Piece(codes, qtype, x.scale, codes)
    return Piece(part, qtype)


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    """Flattened alike, in the order of memory that most of them have: those are not copied."""
    strides, _ = Counter(tensor.stride() for tensor in tensors).most_common(1)[0]
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    return [tensor.permute(order).flatten() for tensor in tensors]
