"""One streaming histogram of magnitudes; every calibration method reads its threshold from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qatlib.errors import TrainingError
from qatlib.fake.qconfig import FakeQuantSpec
from qatlib.qtype import DEAD_SCALE, limits, scale_of

_FRACTIONS = 100
_SMALLEST_LIMIT = 2.0**-100
"""Keeps bins / limit a float32."""


class Histogram:
    """Counts of ``|x|`` in equal bins over ``[0, limit)``, and the exact extremes.

    When a batch exceeds the limit, the limit doubles and neighbouring bins merge, so memory does not grow with the data
    and no value is dropped. Counts do not depend on how the data is cut into batches, but the limit is fixed by the
    first batch up to doublings.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.limit = 0.0
        self.low = math.inf
        self.high = -math.inf

    @property
    def largest(self) -> float:
        """Largest magnitude seen; 0 if nothing was."""
        return max(abs(self.low), abs(self.high)) if self.low <= self.high else 0.0

    def update(self, x: Tensor, where: str) -> None:
        """Add a tensor of any shape; raises TrainingError (QAT160) if it holds NaN or infinity."""
        if x.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~torch.isfinite(x)).sum())
            raise TrainingError(
                "QAT160",
                where,
                f"output holds {count} non-finite of {x.numel()} elements",
                "Check the float model and the data with float-check",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        top = max(abs(low), abs(high))
        self._grow(top)
        where_in = (x.detach().flatten().abs() * (self.bins / self.limit)).to(torch.int64).clamp_(max=self.bins - 1)
        self.counts += torch.bincount(where_in, minlength=self.bins).cpu()

    def _grow(self, top: float) -> None:
        if self.limit == 0.0:
            self.limit = max(top, _SMALLEST_LIMIT) if top else DEAD_SCALE
        while top > self.limit:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.limit *= 2

    # -- thresholds ----------------------------------------------------------------------------------------------

    def threshold(self, spec: FakeQuantSpec) -> float:
        """Largest magnitude to keep, by ``spec.method``."""
        if self.largest == 0.0:
            return 0.0
        if spec.method == "percentile":
            return self._percentile(spec.percentile)
        return self._least_squares(spec.dtype) if spec.method == "mse" else self.largest

    def _percentile(self, percent: float) -> float:
        """Upper edge of the first bin at which ``percent`` % of the values are covered."""
        running = torch.cumsum(self.counts, 0)
        needed = math.ceil(int(running[-1]) * percent / 100)
        index = int(torch.searchsorted(running, torch.tensor(max(1, needed))))
        return min((index + 1) * self.limit / self.bins, self.largest)

    def _least_squares(self, dtype: str) -> float:
        """The fraction k/100 of the largest magnitude with the least squared quantization error."""
        _, qmax = limits(dtype)
        centers = (torch.arange(self.bins, dtype=torch.float64) + 0.5) * (self.limit / self.bins)
        weights = self.counts.double()
        best, least = self.largest, math.inf
        for k in range(1, _FRACTIONS + 1):
            threshold = self.largest * k / _FRACTIONS
            scale = scale_of(threshold, dtype)
            error = centers - (centers / scale).round().clamp(max=qmax) * scale
            total = float((weights * error.square()).sum())
            if total < least:
                best, least = threshold, total
        return best
