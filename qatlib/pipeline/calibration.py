"""What surrounds calibration in the pipeline: comparing methods, held-out data, and what the stage reports of both."""

from __future__ import annotations

import csv
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from qatlib.atomic import write_csv
from qatlib.errors import DataError, StageError
from qatlib.fake.calibrate import ranges_on, settle
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.ranges import OUTSIDE, Range, ranges_of
from qatlib.pipeline.metrics import ratio
from qatlib.pipeline.project import Project


@dataclass(frozen=True)
class Compared:
    """One method on validation data: the metric's ``value``, its ``ratio`` to float (NaN if undefined), and the
    ``seconds`` that choosing all thresholds took. ``percentile`` is None but for that method.
    """

    method: str
    percentile: float | None
    value: float
    ratio: float
    images: int
    seconds: float


def compare_methods(project: Project, model: FakeQuantModel) -> tuple[Compared, ...]:
    """Score a calibrated model by every method of ``calibrate.compare``, all from the histograms of the one pass.

    Leaves the model as it was calibrated. The data are ``calibrate.compare_images`` validation items: the test split
    decides nothing.
    """
    section = project.config.calibrate
    if not section.compare:
        return ()
    metric, images = project.metric(), section.compare_images
    float_value = project.evaluate(project.float_model, "val", images).value
    rows = []
    for asked in section.compare:
        start = time.perf_counter()
        settle(model, asked.method, asked.percentile)
        seconds = time.perf_counter() - start
        scored = project.evaluate(model, "val", images)
        percentile = (asked.percentile or section.percentile) if asked.method == "percentile" else None
        try:
            kept = ratio(scored.value, float_value, metric.higher_is_better)
        except DataError:
            kept = math.nan
        rows.append(Compared(asked.method, percentile, scored.value, kept, scored.images, seconds))
    settle(model)
    return tuple(rows)


def write_comparison(path: str | Path, rows: Sequence[Compared], metric: str) -> None:
    """CSV with a line per method; the header alone if none was asked for."""
    write_csv(path, ["method", "percentile", metric, "ratio", "images", "seconds"], map(_cells, rows))


def read_comparison(path: str | Path) -> tuple[Compared, ...]:
    """What :func:`write_comparison` wrote; raises StageError QAT195 for anything else."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        return tuple(
            Compared(method, float(at) if at else None, float(value), float(kept or "nan"), int(images), float(seconds))
            for method, at, value, kept, images, seconds in rows
        )
    except (OSError, ValueError) as error:
        fix = "Run that stage again: dvc repro --force --single-item calibrate"
        raise StageError("QAT195", str(path), f"is no table of compared methods ({error})", fix) from None


def comparison_table(rows: Sequence[Compared], metric: str) -> Table:
    """The same for a terminal."""
    table = Table("method", "percentile", metric, "ratio to float", "images", "seconds", title="Calibration methods")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Compared) -> list[str]:
    percentile = "" if row.percentile is None else f"{row.percentile:g}"
    kept = "" if math.isnan(row.ratio) else f"{row.ratio:.6g}"
    return [row.method, percentile, f"{row.value:.6g}", kept, str(row.images), f"{row.seconds:.2f}"]


def measured_ranges(project: Project, model: FakeQuantModel) -> tuple[tuple[Range, ...], int]:
    """What calibration found of every activation, beside one validation batch; and the size of that batch."""
    size = project.config.calibrate.batch_size
    loader = project.batches("val", size, size)
    ranges = ranges_of(model, ranges_on(model, loader, project.device))
    return ranges, len(loader.dataset)  # type: ignore[arg-type]


def range_metrics(ranges: Sequence[Range], images: int) -> dict[str, float | int]:
    """Numbers of the metric file; see ``docs/calibration.md``."""
    seen = [r for r in ranges if r.largest > 0 and not math.isnan(r.held_largest)]
    return {
        "held_out_images": images,
        "held_out_tensors": len(ranges),
        "held_out_tensors_outside": sum(r.outside for r in ranges),
        "held_out_least_covered": min((r.covered for r in ranges), default=1.0),
        "held_out_median_range": median(r.held_largest / r.largest for r in seen) if seen else 1.0,
    }


def range_notes(ranges: Sequence[Range], method: str) -> list[str]:
    """Lines for the terminal: what ``auto`` took, and the activation that held-out data leaves furthest."""
    notes = []
    if method == "auto":
        taken = Counter(r.method for r in ranges)
        notes.append("auto took " + ", ".join(f"{name} for {count}" for name, count in taken.most_common()))
    outside = [r for r in ranges if r.outside]
    if outside:
        worst = min(outside, key=lambda r: r.covered)
        notes.append(
            f"warning: a validation batch leaves the calibrated range of {len(outside)} of {len(ranges)} activations by"
            f" more than {OUTSIDE:.0%}, furthest at {worst.op}: {worst.held_largest:.4g} against {worst.largest:.4g}."
            " Calibrate on more, or more representative, data"
        )
    return notes
