"""Which magnitudes an activation keeps: every calibration method reads its threshold from one histogram.

Formulas are in ``docs/calibration.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from qatlib.fake.qconfig import FakeQuantSpec, Method
from qatlib.qtype import DEAD, limits, scale_of

MIX = (100.0, 99.999, 99.995, 99.99, 99.95, 99.9)
"""Percentiles among which ``mix`` chooses."""
AUTO: tuple[Method, ...] = ("min_max", "percentile", "mix", "kl", "mse")
"""Methods among which ``auto`` chooses; of equal errors the first wins."""
_FRACTIONS = 100
_KL_BINS = 512


@dataclass(frozen=True)
class Choice:
    """A threshold in the tensor's own unit, and the method that gave it."""

    method: Method
    threshold: float


class Magnitudes:
    """``counts`` of ``|x|`` in bins of ``width``, int64 ``[bins]``, and the exact ``largest``, above 0."""

    def __init__(self, counts: Tensor, width: float, largest: float) -> None:
        used = min(len(counts), math.floor(largest / width) + 1)
        self.counts, self.width, self.largest = counts[:used].double(), width, largest
        self._running = torch.cumsum(counts, 0)

    def choose(self, spec: FakeQuantSpec) -> Choice:
        """The threshold by ``spec.method``; ``auto`` says which method it took."""
        if spec.method == "auto":
            found = [Choice(method, self._by(method, spec)) for method in AUTO]
            errors = self.errors([choice.threshold for choice in found], spec.dtype)
            return found[int(errors.argmin())]
        return Choice(spec.method, self._by(spec.method, spec))

    def _by(self, method: Method, spec: FakeQuantSpec) -> float:
        if method == "percentile":
            return self._percentile(spec.percentile)
        if method == "mse":
            return self._best([self.largest * k / _FRACTIONS for k in range(_FRACTIONS, 0, -1)], spec.dtype)
        if method == "mix":
            return self._best([self._percentile(p) for p in MIX], spec.dtype)
        return self._divergence(spec.dtype) if method == "kl" else self.largest

    def errors(self, thresholds: list[float], dtype: str) -> Tensor:
        """Mean squared error of quantizing, float64 ``[len(thresholds)]``; within a bin all values are as likely."""
        _, qmax = limits(dtype)
        scale = torch.tensor([scale_of(t, dtype) for t in thresholds], dtype=torch.float64).unsqueeze(1)
        edges = torch.arange(len(self.counts) + 1, dtype=torch.float64) * self.width / scale
        code = (edges + 0.5).floor_().clamp_(max=qmax)
        # The integral of (x - code)^2 from 0 to the edge, in units of scale^3: 1/12 for each code passed, and the rest.
        apart = edges.sub_(code)
        integral = code / 12 + (apart * apart * apart + 0.125) / 3
        return scale.squeeze(1) ** 3 * (integral.diff() @ self.counts) / (self.width * int(self._running[-1]))

    def sqnr_db(self, threshold: float, dtype: str) -> float:
        """Power of the signal over that of the error of quantizing, in dB."""
        centers = (torch.arange(len(self.counts), dtype=torch.float64) + 0.5) * self.width
        power = float(self.counts @ (centers.square() + self.width**2 / 12)) / int(self._running[-1])
        return 10 * math.log10(power / float(self.errors([threshold], dtype)))

    def _best(self, thresholds: list[float], dtype: str) -> float:
        return thresholds[int(self.errors(thresholds, dtype).argmin())]

    def _percentile(self, percent: float) -> float:
        """Edge of the first bin at which ``percent`` % of the values are covered; for all of them the largest."""
        total = int(self._running[-1])
        needed = max(1, math.ceil(Fraction(str(percent)) * total / 100))
        if needed == total:
            return self.largest
        return self._edge(int(torch.searchsorted(self._running, needed)) + 1, len(self.counts))

    def _edge(self, i: int, of: int) -> float:
        """The upper end of bin ``i`` of ``of`` in use, where the last one ends at the largest value.

        The width is a power of two over the number of bins. Multiples of it would make ratios of scales fractions of
        small whole numbers, and many requantized values halves (``docs/numerics.md``); the largest values do not.
        """
        return self.largest * i / of

    def _divergence(self, dtype: str) -> float:
        """Threshold of the least Kullback-Leibler divergence of what is kept from what was seen."""
        counts = self._coarse()
        levels, bins = limits(dtype)[1] + 1, len(counts)
        if bins <= levels or not counts.any():
            return self.largest
        kept = torch.arange(levels, bins + 1)  # [candidates]: bins below the threshold
        borders = -(-torch.arange(levels + 1) * kept.unsqueeze(1) // levels)
        sums, filled = (_before(values)[borders].diff() for values in (counts, (counts > 0).double()))
        logs = torch.where(sums > 0, (sums / filled.clamp(min=1)).log(), 0.0)  # of the share of each bin of a level
        inside = _before(counts)[kept]
        last, clipped = counts[kept - 1], counts.sum() - inside
        # Up to constants: sum of p log p less sum of p log q. Clipped values are seen in the last bin below the
        # threshold, and stored as what it holds; where it holds nothing, the divergence is infinite.
        seen = _before(torch.xlogy(counts, counts))[kept - 1] + torch.xlogy(last + clipped, last + clipped)
        stored = (sums * logs).sum(1) + clipped * logs[:, -1] - counts.sum() * inside.log()
        impossible = (inside == 0) | ((clipped > 0) & (last == 0))
        best = int(torch.where(impossible, math.inf, seen - stored).argmin())
        return self._edge(best + levels, bins)

    def _coarse(self) -> Tensor:
        """Counts up to the largest value with bins joined, to 512 or as few more as whole bins allow.

        Of the first no more than of the second: relu fills it with zeros, which every threshold keeps.
        """
        joined = max(1, len(self.counts) // _KL_BINS)
        counts = F.pad(self.counts, (0, -len(self.counts) % joined)).view(-1, joined).sum(1)
        counts[0] = counts[:2].amin()
        return counts


def kept_of_channels(weight: Tensor, dtype: str) -> Tensor:
    """Of every channel of ``weight`` ``[O, ...]``, the k/100 of its largest magnitude with the least squared error.

    float32 ``[O]``. Unlike in a histogram, every value counts as it is.
    """
    qmin, qmax = limits(dtype)
    rows = weight.flatten(1)
    largest = rows.abs().amax(1, keepdim=True).clamp(min=DEAD)
    best, least = torch.ones_like(largest), torch.full_like(largest, math.inf, dtype=torch.float64)
    for k in range(_FRACTIONS, 0, -1):
        share = torch.full_like(largest, k / _FRACTIONS)
        scale = (largest.double() * share.double() * 2 / (qmax - qmin)).float()
        error = ((rows / scale).round_().clamp_(qmin, qmax).mul_(scale) - rows).square_()
        error = error.sum(1, keepdim=True, dtype=torch.float64)
        best, least = torch.where(error < least, share, best), torch.minimum(error, least)
    return best.squeeze(1)


def _before(values: Tensor) -> Tensor:
    """Sums of what comes before each position, the end included: ``[n + 1]``."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
