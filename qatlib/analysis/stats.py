"""Streaming statistics: of one tensor, and of the distance between two. Sums are float64; memory is constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlib.errors import TrainingError
from qatlib.qtype import QType

BINS = 256
"""Bins of the code histograms behind :attr:`Comparison.kl`: one per int8 code, 256 int16 codes each."""

_PIECE = 2**17
"""Elements: half a MiB of float64."""

Measure = Callable[[Tensor, Tensor], float]
"""A user's own similarity of (reference, other); averaged over batches, weighted with their number of elements."""


@dataclass(frozen=True)
class Summary:
    """Range and moments of one tensor over all batches, in its own unit. ``var`` is the population variance."""

    count: int
    min: float
    max: float
    mean: float
    var: float

    @property
    def amax(self) -> float:
        """Largest absolute value."""
        return max(abs(self.min), abs(self.max))


@dataclass(frozen=True)
class Comparison:
    """Distance between a reference tensor and another one of equal shape, over all batches.

    ``dot``, ``ref_sq``, ``other_sq``, ``se`` and ``l1_sum`` are sums over elements. ``differing``, ``above_1_lsb``
    (codes that differ, and differ by more than one), ``saturated`` (reference values outside the format) and ``kl``
    are None where the output has no scale, like ``histograms``: how many values of the reference and of the other fall
    on each code, in :data:`BINS` equal bins from qmin to qmax; what the format clips counts at its ends. ``kl`` is
    their divergence KL(reference || other), in nats.
    """

    count: int
    dot: float
    ref_sq: float
    other_sq: float
    se: float
    l1_sum: float
    max_abs: float
    scale: float | None = None
    differing: int | None = None
    above_1_lsb: int | None = None
    saturated: int | None = None
    histograms: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    kl: float | None = None
    custom: float | None = None

    @property
    def cosine(self) -> float:
        """Cosine similarity; 0 if either tensor is zero everywhere."""
        norm = math.sqrt(self.ref_sq) * math.sqrt(self.other_sq)
        if norm == 0.0:
            return 0.0
        return 1.0 if self.se == 0.0 else max(-1.0, min(1.0, self.dot / norm))

    @property
    def mse(self) -> float:
        return self.se / self.count

    @property
    def l1(self) -> float:
        """Mean absolute error."""
        return self.l1_sum / self.count

    @property
    def sqnr_db(self) -> float:
        """``10 log10(sum ref^2 / sum (other - ref)^2)``; inf for identical tensors, -inf for a zero reference."""
        if self.se == 0.0:
            return math.inf
        return 10.0 * math.log10(self.ref_sq / self.se) if self.ref_sq > 0.0 else -math.inf

    @property
    def max_lsb(self) -> float | None:
        """Largest absolute error in units of the output scale."""
        return None if self.scale is None else self.max_abs / self.scale

    @property
    def differing_share(self) -> float | None:
        """Share of elements whose codes differ."""
        return None if self.differing is None else self.differing / self.count


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of every tensor, flat, few enough to stay in cache; on a GPU all at once."""
    size = _PIECE if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    if tensors[0].numel():
        yield from zip(*(torch.split(tensor.detach().flatten(), size) for tensor in tensors), strict=True)


class RunningSummary:
    """Accumulates a :class:`Summary` (Chan's pairwise update of mean and squared deviation)."""

    def __init__(self) -> None:
        self._count, self._min, self._max, self._mean, self._m2 = 0, math.inf, -math.inf, 0.0, 0.0

    def add(self, tensor: Tensor) -> None:
        for (piece,) in _pieces(tensor):
            self._add(piece.double())

    def _add(self, values: Tensor) -> None:
        count = values.numel()
        low, high = values.aminmax()
        mean = float(values.mean())
        m2 = float((values - mean).square_().sum())
        delta, total = mean - self._mean, self._count + count
        self._m2 += m2 + delta * delta * self._count * count / total
        self._mean += delta * count / total
        self._count = total
        self._min, self._max = min(self._min, float(low)), max(self._max, float(high))

    def result(self) -> Summary | None:
        """None before the first element."""
        if self._count == 0:
            return None
        return Summary(self._count, self._min, self._max, self._mean, self._m2 / self._count)


class RunningComparison:
    """Accumulates a :class:`Comparison`; ``qtype`` is the format in which codes are counted."""

    def __init__(self, qtype: QType, measure: Measure | None = None) -> None:
        self._scale = qtype.scale
        self._limits = qtype.limits if qtype.scale is not None else (0, 0)
        self._measure = measure
        self._count = self._differing = self._above = self._saturated = 0
        self._dot = self._ref_sq = self._other_sq = self._se = self._l1 = self._max_abs = self._custom = 0.0
        self._histograms = torch.zeros(2, BINS, dtype=torch.int64)

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Add one batch; shapes must be equal."""
        if reference.numel() == 0:
            return
        if self._measure is not None:
            self._custom += float(self._measure(reference, other)) * reference.numel()
        for ref, oth in _pieces(reference, other):
            self._add(ref.double(), oth.double())
            if self._scale is not None:
                self._add_codes(ref.float(), oth.float(), self._scale)

    def _add(self, ref: Tensor, oth: Tensor) -> None:
        diff = oth - ref
        self._count += ref.numel()
        self._dot += float(ref.dot(oth))
        self._ref_sq += float(ref.dot(ref))
        self._other_sq += float(oth.dot(oth))
        self._se += float(diff.dot(diff))
        magnitude = diff.abs_()
        self._l1 += float(magnitude.sum())
        self._max_abs = max(self._max_abs, float(magnitude.max()))

    def _add_codes(self, ref: Tensor, oth: Tensor, scale: float) -> None:
        qmin, qmax = self._limits
        raw = ref.div(torch.tensor(scale, device=ref.device)).round_()  # numerics.md, section 2
        low, high = torch.stack(torch.aminmax(raw)).tolist()
        if low < qmin or high > qmax:  # truth values cost more than arithmetic: none where there is nothing to count
            self._saturated += int(((raw < qmin) | (raw > qmax)).sum())
        codes, others = raw.clamp_(qmin, qmax), oth.div(torch.tensor(scale, device=oth.device)).round_()
        step = codes.sub(others.clamp_(qmin, qmax)).abs_()
        differing = int(torch.count_nonzero(step))
        self._differing += differing
        if differing and float(step.max()) > 1:
            self._above += int((step > 1).sum())
        first = _histogram(codes, qmin, qmax)
        self._histograms += torch.stack([first, _histogram(others, qmin, qmax) if differing else first])

    def result(self) -> Comparison | None:
        """None before the first element."""
        if self._count == 0:
            return None
        quantized = self._scale is not None
        return Comparison(
            count=self._count,
            dot=self._dot,
            ref_sq=self._ref_sq,
            other_sq=self._other_sq,
            se=self._se,
            l1_sum=self._l1,
            max_abs=self._max_abs,
            scale=self._scale,
            differing=self._differing if quantized else None,
            above_1_lsb=self._above if quantized else None,
            saturated=self._saturated if quantized else None,
            histograms=_rows(self._histograms) if quantized else None,
            kl=_divergence(self._histograms) if quantized else None,
            custom=self._custom / self._count if self._measure is not None else None,
        )


def _histogram(codes: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.bincount(codes.sub(qmin).div_((qmax - qmin + 1) // BINS).int(), minlength=BINS).cpu()


def _rows(histograms: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, second = histograms.tolist()
    return tuple(first), tuple(second)


def _divergence(histograms: Tensor) -> float:
    """KL(row 0 || row 1) in nats; each bin starts at one half, so that an empty bin is finite."""
    p, q = ((row + 0.5) / (row + 0.5).sum() for row in histograms.double())
    return max(0.0, float((p * (p / q).log()).sum()))


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise TrainingError (QAT165) if ``tensor`` holds a NaN or an infinity."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise TrainingError(
            "QAT165",
            where,
            f"{bad} of {tensor.numel()} output elements are NaN or infinite; nothing after it can be compared",
            "Check the input data and this module's weights for NaN and division by zero",
        )
