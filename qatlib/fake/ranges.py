"""What calibration found of every activation, and how far held-out data leaves it: one row each, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from qatlib.atomic import write_csv
from qatlib.errors import StageError
from qatlib.fake.calibrate import quantizers
from qatlib.fake.model import FakeQuantModel
from qatlib.qtype import DEAD

OUTSIDE = 0.1
"""Held-out values may exceed the calibrated range by this share before the range counts as left."""


@dataclass(frozen=True)
class Range:
    """One activation, in its own unit; NaN for what was not measured.

    ``low`` and ``high`` are the extremes in calibration, ``held_low`` and ``held_high`` those of held-out data;
    ``kept`` is the threshold by ``method``, or what masks need beyond it. ``sqnr_db`` is what quantizing the
    calibration data costs, from the histogram.
    """

    op: str
    dtype: str
    method: str
    kept: float
    scale: float
    low: float
    high: float
    held_low: float = math.nan
    held_high: float = math.nan
    sqnr_db: float = math.nan

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high))

    @property
    def held_largest(self) -> float:
        """NaN if it was not measured."""
        return max(abs(self.held_low), abs(self.held_high))

    @property
    def covered(self) -> float:
        """Share of the held-out range that calibration has seen, 0 to 1; 1 if it was not measured."""
        return self.largest / self.held_largest if self.held_largest > self.largest else 1.0

    @property
    def outside(self) -> bool:
        """Whether held-out data leaves the calibrated range by more than :data:`OUTSIDE`."""
        return self.held_largest > self.largest * (1 + OUTSIDE)


def ranges_of(model: FakeQuantModel, held: Mapping[str, tuple[float, float]]) -> tuple[Range, ...]:
    """Every activation that was calibrated, in forward order; ``held`` are the extremes of held-out data by op."""
    found = []
    for name, fake in quantizers(model):
        histogram, dtype = fake.histogram, fake.spec.dtype
        if histogram.low > histogram.high:
            continue
        choice = histogram.choose(fake.spec)
        kept = choice.threshold if fake.spec.scale else max(choice.threshold, float(fake.room))
        counted = histogram.counting and histogram.largest >= DEAD
        sqnr = histogram.magnitudes("SQNR").sqnr_db(kept, dtype) if counted else math.nan
        low, high = held.get(name, (math.nan, math.nan))
        found.append(
            Range(
                name,
                dtype,
                choice.method,
                kept,
                float(fake.scale),
                histogram.low,
                histogram.high,
                low,
                high,
                sqnr,
            )
        )
    return tuple(found)


def write_ranges(path: str | Path, ranges: Sequence[Range]) -> None:
    """One line per activation, 6 significant digits; an empty field where nothing was measured."""
    write_csv(path, (field.name for field in fields(Range)), map(astuple, ranges))


def read_ranges(path: str | Path) -> tuple[Range, ...]:
    """What :func:`write_ranges` wrote; raises StageError, QAT192 for a missing file, QAT195 for another content."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        raise StageError("QAT192", str(path), "does not exist", "Run dvc repro") from None
    try:
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
        return tuple(Range(**{f.name: _value(row[f.name], f.type == "str") for f in fields(Range)}) for row in rows)
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        again = "Run that stage again: dvc repro --force --single-item calibrate"
        raise StageError("QAT195", str(path), f"is not a table of ranges ({error})", again) from None


def _value(cell: str, is_name: bool) -> Any:
    return cell if is_name else float(cell or "nan")
