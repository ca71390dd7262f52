"""How far the results of one model are from those of another: of the network's outputs, and of the user's metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qatlib.analysis.stats import RunningComparison
from qatlib.errors import DataError
from qatlib.pipeline.metrics import Metric
from qatlib.qtype import FLOAT

NewMetric = Callable[[], Metric]
"""Makes a fresh metric for one evaluation."""


@dataclass(frozen=True)
class Distance:
    """Of all real-valued outputs of a network from their reference, over all samples.

    ``noise`` is the power of the error over that of the reference, the mean of all outputs; ``mse`` and ``cosine`` take
    all elements together. ``metric`` is the user's, None where it was not asked for.
    """

    noise: float
    mse: float
    cosine: float
    metric: float | None = None

    @property
    def sqnr_db(self) -> float:
        """``-10 log10 noise``; inf for identical outputs."""
        if self.noise == 0.0:
            return math.inf
        return -10.0 * math.log10(self.noise) if math.isfinite(self.noise) else -math.inf


class Meter:
    """Accumulates a :class:`Distance` batch by batch."""

    def __init__(self, metric: NewMetric | None = None) -> None:
        self._outputs: list[RunningComparison] = []
        self._all = RunningComparison(FLOAT)
        self._metric = None if metric is None else metric()

    def add(
        self, reference: Sequence[Tensor], leaves: Sequence[Tensor], nested: Any = None, targets: Any = None
    ) -> None:
        """One batch: leaves of both results; for a metric what the model returned, and the targets.

        Raises DataError: QAT214 if no output holds real numbers, QAT215 for a metric without targets.
        """
        pairs = real_outputs(reference, leaves)
        self._outputs = self._outputs or [RunningComparison(FLOAT) for _ in pairs]
        for running, (a, b) in zip(self._outputs, pairs, strict=True):
            running.add(a, b)
            self._all.add(a, b)
        if self._metric is not None:
            if targets is None:
                fix = "Give batches of (inputs, targets), or leave the metric out"
                raise DataError("QAT215", f"metric {self._metric.name}", "needs targets, which the batch lacks", fix)
            self._metric.update(nested, targets)

    def result(self) -> Distance:
        """Raises DataError (QAT118) if every output was empty."""
        whole = self._all.result()
        if whole is None:
            raise DataError("QAT118", "analysis data", "every output is empty", "Give batches of real input")
        results = [seen for running in self._outputs if (seen := running.result()) is not None]
        power = sum(noise(seen.se, seen.ref_sq) for seen in results) / len(results)
        return Distance(power, whole.mse, whole.cosine, None if self._metric is None else float(self._metric.compute()))


def real_outputs(reference: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Outputs of real numbers of both results, in float64. Raises DataError QAT214 if there is none."""
    pairs = [(a.double(), b.double()) for a, b in zip(reference, leaves, strict=True) if a.is_floating_point()]
    if not pairs:
        fix = "Analyse the model without its last step, so that scores or coordinates come out"
        raise DataError("QAT214", "outputs", "hold integers or truth values alone, which have no distance", fix)
    return pairs


def noise(se: float, ref_sq: float) -> float:
    """Power of an error over that of its reference."""
    if ref_sq > 0.0:
        return se / ref_sq
    return math.inf if se > 0.0 else 0.0
