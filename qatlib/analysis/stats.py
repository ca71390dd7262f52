"""Streaming statistics: of one tensor, and of the distance between two; memory is constant.

Pieces of a tensor are summed in its own precision, and the pieces in float64: sums are good to about six digits.
Counts are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlib.analysis.pieces import Coded, Piece, pieces, real, squares_fit
from qatlib.errors import TrainingError
from qatlib.qtype import FLOAT, QType

BINS = 256
"""Bins of the code histograms behind :attr:`Comparison.kl`: one per int8 code, 256 int16 codes each."""

WHOLE, SAMPLED = 2**17, 16
"""Pieces of so many elements give one of so many to the histograms."""

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

    ``dot``, ``ref_sq``, ``other_sq``, ``se`` and ``l1_sum`` are sums over elements. The rest is None where the output
    has no scale, or was not asked for: ``differing`` and ``above_1_lsb`` (codes that differ, and differ by more than
    one), ``saturated`` (reference values outside the format), and ``histograms``: how many values of the reference and
    of the other fall on each code, in :data:`BINS` equal bins from qmin to qmax; what the format clips counts at its
    ends. ``kl`` is their divergence KL(reference || other), in nats.
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


class RunningSummary:
    """Accumulates a :class:`Summary` (Chan's pairwise update of mean and squared deviation)."""

    def __init__(self) -> None:
        self._count, self._min, self._max, self._mean, self._m2 = 0, math.inf, -math.inf, 0.0, 0.0

    def add(self, tensor: Tensor) -> None:
        for (piece,) in pieces(FLOAT, tensor):
            self.add_piece(piece)

    def add_piece(self, piece: Piece) -> None:
        (low, high), (mean, m2) = piece.extent, piece.moments
        delta, total = mean - self._mean, self._count + piece.count
        self._m2 += m2 + delta * delta * self._count * piece.count / total
        self._mean += delta * piece.count / total
        self._count = total
        self._min, self._max = min(self._min, low), max(self._max, high)

    def result(self) -> Summary | None:
        """None before the first element."""
        if self._count == 0:
            return None
        return Summary(self._count, self._min, self._max, self._mean, self._m2 / self._count)


class RunningComparison:
    """Accumulates a :class:`Comparison`; ``qtype`` is the format in which codes are counted.

    Without ``steps`` it does not count the codes that differ, without ``histograms`` it has none, and no KL. Large
    tensors give every 16th element to the histograms, which stands for all.
    """

    def __init__(
        self, qtype: QType, measure: Measure | None = None, steps: bool = True, histograms: bool = True
    ) -> None:
        self._qtype, self._measure = qtype, measure
        self._steps = steps and qtype.scale is not None
        self._count = self._differing = self._above = self._saturated = self._sampled = 0
        self._dot = self._ref_sq = self._other_sq = self._se = self._l1 = self._max_abs = self._custom = 0.0
        counted = histograms and qtype.scale is not None
        self._histograms = torch.zeros(2, BINS, dtype=torch.int64) if counted else None

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Add one batch; shapes must be equal."""
        self.measure(reference, other)
        for ref, oth in pieces(self._qtype, reference, other):
            self.add_pieces(ref, oth)

    def measure(self, reference: Tensor, other: Tensor | Coded) -> None:
        """The user's measure of one batch."""
        if self._measure is not None and reference.numel():
            self._custom += float(self._measure(reference, real(other))) * reference.numel()

    def add_pieces(self, ref: Piece, oth: Piece) -> None:
        """Add the same part of both; elements of both are stored in one unit."""
        diff = oth.stored.sub(ref.stored).abs_()
        largest, unit = float(diff.amax()), ref.unit
        if not squares_fit(largest):
            diff = oth.stored.double().sub_(ref.stored).abs_()
        if "extent" not in oth.__dict__:
            oth.magnitude = ref.magnitude + largest * unit
        l1 = float(diff.sum()) if largest else 0.0
        by_one = ref.is_coded and largest <= 1
        se = l1 if by_one or not largest else float(diff.dot(diff))
        se *= unit**2
        other_sq = oth.sq if largest else ref.sq
        self._count += ref.count
        self._ref_sq += ref.sq
        self._other_sq += other_sq
        self._dot += (ref.sq + other_sq - se) / 2
        self._se += se
        self._l1 += l1 * unit
        self._max_abs = max(self._max_abs, largest * unit)
        if self._qtype.scale is not None:
            self._saturated += ref.saturated
        if self._steps and by_one:
            self._differing += int(l1)
        elif self._steps and largest:
            self._add_steps(diff if ref.is_coded else ref.codes.sub(oth.codes).abs_())
        if self._histograms is not None:
            self._add_histograms(ref, oth if largest else ref)

    def _add_steps(self, step: Tensor) -> None:
        """By how many codes elements differ; overwrites it."""
        if float(step.amax()) > 1:  # sums of zeros and ones: truth values are slower to count
            ones = step.clamp(max=1)
            self._above += int(step.sub_(ones).clamp_(max=1).sum())
            step = ones
        self._differing += int(step.sum())

    def _add_histograms(self, ref: Piece, oth: Piece) -> None:
        assert self._histograms is not None
        weight = SAMPLED if ref.count >= WHOLE else 1
        if weight > 1:  # from another place each time, else channels last would show the same channels
            start = self._sampled % SAMPLED
            ref, oth = ref.sample(start, SAMPLED), oth.sample(start, SAMPLED)
            self._sampled += 1
        self._histograms += torch.stack([self._histogram(ref.codes), self._histogram(oth.codes)]) * weight

    def _histogram(self, codes: Tensor) -> Tensor:
        """Counts of :data:`BINS` bins; negative bytes count as large ones, of all kinds the fastest to count."""
        qmin, qmax = self._qtype.limits
        width = (qmax - qmin + 1) // BINS
        bins = codes if width == 1 else codes.div(width).floor_()
        return torch.bincount(bins.to(torch.int8).view(torch.uint8), minlength=BINS).roll(BINS // 2).cpu()

    def result(self) -> Comparison | None:
        """None before the first element."""
        if self._count == 0:
            return None
        counted = self._histograms
        return Comparison(
            count=self._count,
            dot=self._dot,
            ref_sq=self._ref_sq,
            other_sq=self._other_sq,
            se=self._se,
            l1_sum=self._l1,
            max_abs=self._max_abs,
            scale=self._qtype.scale,
            differing=self._differing if self._steps else None,
            above_1_lsb=self._above if self._steps else None,
            saturated=None if self._qtype.scale is None else self._saturated,
            histograms=None if counted is None else _rows(counted),
            kl=None if counted is None else _divergence(counted),
            custom=self._custom / self._count if self._measure is not None else None,
        )


def _rows(histograms: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, second = histograms.tolist()
    return tuple(first), tuple(second)


def _divergence(histograms: Tensor) -> float:
    """KL(row 0 || row 1) in nats; each bin starts at one half, so that an empty bin is finite."""
    p, q = ((row + 0.5) / (row + 0.5).sum() for row in histograms.double())
    return max(0.0, float((p * (p / q).log()).sum()))


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise TrainingError (QAT165) if ``tensor`` holds a NaN or an infinity."""
    if not tensor.is_floating_point() or math.isfinite(float(tensor.sum())):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:  # else the sum alone was too large
        raise TrainingError(
            "QAT165",
            where,
            f"{bad} of {tensor.numel()} output elements are NaN or infinite; nothing after it can be compared",
            "Check the input data and this module's weights for NaN and division by zero",
        )
