"""One streaming histogram of magnitudes; every calibration method reads its threshold from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qatlib.errors import TrainingError
from qatlib.fake.qconfig import FakeQuantSpec
from qatlib.fake.thresholds import Choice, Magnitudes
from qatlib.qtype import limits

SAMPLED = 2**16
"""Elements of a tensor that are counted per batch, at most; its extremes are always exact."""
_SMALLEST_LIMIT = 2.0**-100
"""Keeps bins / limit a float32."""


class Histogram:
    """Counts of ``|x|`` in equal bins over ``[0, limit)``, and the exact extremes.

    The limit is the smallest power of two above the largest magnitude. When a batch exceeds it, it doubles and
    neighbouring bins merge, so memory does not grow with the data, no value is dropped, and two histograms add up
    exactly, whatever their limits. Without ``counting`` only the extremes are kept, which is far cheaper.

    Of a tensor with more than :data:`SAMPLED` elements every n-th is counted, as n of them.
    """

    def __init__(self, bins: int, counting: bool = True) -> None:
        self.bins, self.counting = bins, counting
        self.counts = torch.zeros(bins if counting else 0, dtype=torch.int64)
        self.limit = _SMALLEST_LIMIT
        self.low = math.inf
        self.high = -math.inf

    @classmethod
    def of(cls, spec: FakeQuantSpec, counting: bool = False) -> Histogram:
        """What ``spec`` needs to choose its threshold; with ``counting`` what every method needs."""
        return cls(spec.bins, spec.scale is None and (counting or spec.method != "min_max"))

    @property
    def largest(self) -> float:
        """Largest magnitude seen; 0 if nothing was."""
        return max(abs(self.low), abs(self.high)) if self.low <= self.high else 0.0

    def update(self, x: Tensor, where: str) -> None:
        """Add a tensor of any shape; raises TrainingError (QAT160) if it holds NaN or infinity."""
        if x.numel() == 0:
            return
        x = x.detach()
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~torch.isfinite(x)).sum())
            raise TrainingError(
                "QAT160",
                where,
                f"output holds {count} non-finite of {x.numel()} elements",
                "Check the float model and the data with float-check",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.counting:
            self._grow(_limit_above(self.largest))
            step = _step(x.numel())
            index = x.reshape(-1)[::step].abs().mul_(self.bins / self.limit).to(torch.int64).clamp_(max=self.bins - 1)
            self.counts += torch.bincount(index, minlength=self.bins).cpu() * step

    def merge(self, other: Histogram) -> None:
        """Add what another histogram saw, as if this one had seen it; raises TrainingError (QAT167) for other bins."""
        if (self.bins, self.counting) != (other.bins, other.counting):
            raise TrainingError(
                "QAT167",
                "Histogram.merge",
                f"one has {len(self.counts)} bins of its own, the other {len(other.counts)}",
                "Merge histograms of one FakeQuantSpec",
            )
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if self.counting:
            self._grow(other.limit)
            self.counts += _widened(other.counts, other.limit, self.limit)

    def _grow(self, limit: float) -> None:
        if limit > self.limit:
            self.counts, self.limit = _widened(self.counts, self.limit, limit), limit

    def choose(self, spec: FakeQuantSpec) -> Choice:
        """The threshold by ``spec.method``, or of its fixed scale, and the method that gave it.

        Raises TrainingError (QAT167) for a method that needs counts where only extremes were kept.
        """
        if spec.scale is not None:
            qmin, qmax = limits(spec.dtype)
            return Choice("fixed_scale", spec.scale * (qmax - qmin) / 2)
        if spec.method == "min_max" or self.largest == 0.0:
            return Choice(spec.method, self.largest)
        return self.magnitudes(spec.method).choose(spec)

    def threshold(self, spec: FakeQuantSpec) -> float:
        """Largest magnitude to keep, by ``spec.method``."""
        return self.choose(spec).threshold

    def magnitudes(self, purpose: str) -> Magnitudes:
        """What was counted; raises TrainingError (QAT167) if nothing was, saying for what ``purpose``."""
        if not self.counting:
            raise TrainingError(
                "QAT167",
                "calibration",
                f"{purpose} needs a histogram, and only the extremes were kept",
                "Calibrate with histograms=True, or with a QConfig of that method",
            )
        return Magnitudes(self.counts, self.limit / self.bins, self.largest)


def _limit_above(largest: float) -> float:
    """The smallest power of two above ``largest``."""
    return max(_SMALLEST_LIMIT, 2.0 ** math.frexp(largest)[1])


def _widened(counts: Tensor, limit: float, wider: float) -> Tensor:
    """``counts`` over ``[0, limit)`` as counts of as many bins over ``[0, wider)``; both limits are powers of two."""
    while limit < wider:
        counts = torch.cat([counts.view(-1, 2).sum(1), counts.new_zeros(len(counts) // 2)])
        limit *= 2
        if not counts[1:].any():
            break  # it stays in the first bin
    return counts


def _step(numel: int) -> int:
    """Distance of the elements that are counted. It shares no factor with ``numel``, so none with the size of an axis
    either: every row, column and channel is met equally often.
    """
    step = -(-numel // SAMPLED)
    while math.gcd(step, numel) != 1:
        step += 1
    return step
