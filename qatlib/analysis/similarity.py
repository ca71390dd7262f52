"""The similarity table: how far each op's output is from its reference, in forward order and ordered by op error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from qatlib.analysis.records import Capture, OpRecord
from qatlib.analysis.stats import Comparison
from qatlib.atomic import csv_text, write_text
from qatlib.errors import ConfigError

MEASURES: dict[str, Callable[[Comparison], float | None]] = {
    "Cosine": lambda c: c.cosine,
    "MSE": lambda c: c.mse,
    "L1": lambda c: c.l1,
    "KL": lambda c: c.kl,
    "SQNR": lambda c: c.sqnr_db,
}
"""Selectable similarities. MSE in the output's unit squared, L1 (mean absolute error) in its unit, SQNR in dB, KL in
nats."""

COLUMNS = (
    "Index",
    "Module Name",
    "Module Type",
    "Similarity",
    "qscale",
    "Acc Error (float atol)",
    "Acc Error (N out_qscale)",
    "Op Error with Same Input (N out_qscale)",
)


@dataclass(frozen=True)
class SimilarityRow:
    """One row; None where the quantity does not exist or was not measured.

    Errors are largest absolute differences over all elements: ``acc_error`` in the output's own unit, the other two in
    units of the output scale (LSB). ``similarity`` is of the outputs with each model on its own inputs.
    """

    index: int
    module: str
    module_type: str
    similarity: float | None
    qscale: float | None
    acc_error: float | None
    acc_error_lsb: float | None
    op_error_lsb: float | None


@dataclass(frozen=True)
class SimilarityTable:
    measure: str
    rows: tuple[SimilarityRow, ...]

    def by_op_error(self) -> SimilarityTable:
        """The same rows, largest op error first; rows without one last, in forward order."""
        rows = sorted(self.rows, key=lambda row: (row.op_error_lsb is None, -(row.op_error_lsb or 0.0), row.index))
        return SimilarityTable(self.measure, tuple(rows))

    def csv(self) -> str:
        """Comma-separated text with a header line; an empty cell is a quantity that does not exist."""
        header = (column if column != "Similarity" else f"Similarity ({self.measure})" for column in COLUMNS)
        return csv_text(header, map(astuple, self.rows))


def check_measure(name: str) -> str:
    """Return ``name`` if it is one of :data:`MEASURES` or "custom", else raise ConfigError (QAT107)."""
    if name not in MEASURES and name != "custom":
        raise ConfigError(
            "QAT107",
            "similarity measure",
            f"{name!r} is unknown",
            f"Use one of {', '.join(MEASURES)}, or pass a callable",
        )
    return name


def similarity_of(record: OpRecord, measure: str) -> float | None:
    """Similarity of one op's outputs (accumulated), or None where it was not measured."""
    if record.accumulated is None:
        return None
    return record.accumulated.custom if measure == "custom" else MEASURES[measure](record.accumulated)


def similarity_table(capture: Capture, measure: str = "Cosine") -> SimilarityTable:
    """Table of ``capture`` in forward order; ``measure``: a key of :data:`MEASURES`, or "custom", the capture's own."""
    check_measure(measure)
    return SimilarityTable(measure, tuple(_row(record, measure) for record in capture.records))


def _row(record: OpRecord, measure: str) -> SimilarityRow:
    acc, same = record.accumulated, record.same_input
    return SimilarityRow(
        index=record.index,
        module=record.title,
        module_type=record.type_name,
        similarity=similarity_of(record, measure),
        qscale=record.scale,
        acc_error=acc.max_abs if acc else None,
        acc_error_lsb=acc.max_lsb if acc else None,
        op_error_lsb=same.max_lsb if same else None,
    )


def worst(records: Sequence[OpRecord], count: int) -> list[OpRecord]:
    """The ``count`` records with the lowest same-input SQNR, worst first; those without one are left out."""
    measured = [record for record in records if record.same_input is not None and record.qtype.scale is not None]
    return sorted(measured, key=_sqnr)[:count]


def _sqnr(record: OpRecord) -> tuple[float, int]:
    return (record.same_input.sqnr_db if record.same_input else math.inf), record.index


def write_similarity(seen: Capture, folder: Path) -> None:
    """Both orders of the similarity table of one capture, as CSV."""
    table = similarity_table(seen)
    write_text(folder / f"similarity-{seen.mode}.csv", table.csv())
    write_text(folder / f"similarity-{seen.mode}-by-op-error.csv", table.by_op_error().csv())
