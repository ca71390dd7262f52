"""The statistics table: range and moments of every input, output and parameter, in forward order or widest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from torch import Tensor

from qatlib.analysis.parameters import Parameter
from qatlib.analysis.records import Capture, OpRecord
from qatlib.analysis.stats import RunningSummary, Summary
from qatlib.atomic import csv_text, write_text
from qatlib.qtype import FLOAT, QType

COLUMNS = (
    "Module Index",
    "Module Name",
    "Module Type",
    "Input/Output/Attr",
    "Min",
    "Max",
    "Mean",
    "Var",
    "Scale",
    "Dtype",
)


@dataclass(frozen=True)
class StatisticsRow:
    """One tensor of an op, in its own unit; None where nothing was measured.

    ``role`` is ``input`` (``input-0``, ``input-1``, … of several), ``output``, or the name of a parameter, such as
    ``weight``. ``scale`` is in real units per code; of channels with scales of their own it is a text with the smallest
    and the largest.
    """

    index: int
    module: str
    module_type: str
    role: str
    min: float | None
    max: float | None
    mean: float | None
    var: float | None
    scale: float | str | None
    dtype: str

    @property
    def range(self) -> float | None:
        return None if self.min is None or self.max is None else self.max - self.min


@dataclass(frozen=True)
class StatisticsTable:
    rows: tuple[StatisticsRow, ...]

    def by_range(self) -> StatisticsTable:
        """The same rows, the widest range first; rows without one last, in forward order."""
        widest = sorted(self.rows, key=lambda row: (row.range is None, -(row.range or 0.0)))
        return StatisticsTable(tuple(widest))

    def csv(self) -> str:
        """Comma-separated text with a header line; an empty cell is a quantity that does not exist."""
        return csv_text(COLUMNS, map(astuple, self.rows))


def statistics_table(
    seen: Capture,
    parameters: Mapping[str, Sequence[Parameter]] | None = None,
    inputs: Mapping[str, Summary] | None = None,
) -> StatisticsTable:
    """Values of the first model of a capture, with the formats that the second gives them.

    ``parameters`` are those of the ops by name, ``inputs`` the model's own inputs where the capture has not seen them;
    in FvsQ it has. Values that a softmax takes for 0 are left out, as everywhere.
    """
    sources = {record.name: record for record in seen.records}
    given = {**(inputs or {}), **network_inputs(seen)}
    rows: list[StatisticsRow] = []
    for record in seen.records:
        for role, name in _roles(record.inputs):
            source = sources.get(name)
            summary = source.reference if source else given.get(name)
            rows.append(_row(record, role, summary, source.qtype if source else FLOAT))
        rows.append(_row(record, "output", record.reference, record.qtype))
        own = (parameters or {}).get(record.name, ())
        rows += (_parameter_row(record.index, record.title, record.type_name, one) for one in own)
    return StatisticsTable(tuple(rows))


def network_inputs(seen: Capture) -> dict[str, Summary]:
    """The model's own inputs, which what quantizes them passes on as they are where the first model is float."""
    made = {record.name for record in seen.records}
    first = [r for r in seen.records if r.op == "quantize" and r.inputs[0] not in made] if seen.mode == "FvsQ" else []
    return {record.inputs[0]: record.reference for record in first if record.reference is not None}


def summary_of(tensor: Tensor) -> Summary | None:
    """None of a tensor without elements."""
    running = RunningSummary()
    running.add(tensor)
    return running.result()


def shown_scale(scales: Sequence[float]) -> float | str | None:
    """One scale as it is; of several the smallest, the largest and how many."""
    if len(scales) < 2:
        return scales[0] if scales else None
    return f"{min(scales):.6g} to {max(scales):.6g} ({len(scales)} channels)"


def row_of(
    index: int, module: str, module_type: str, role: str, seen: Summary | None, scale: float | str | None, dtype: str
) -> StatisticsRow:
    low, high, mean, var = (seen.min, seen.max, seen.mean, seen.var) if seen else (None, None, None, None)
    return StatisticsRow(index, module, module_type, role, low, high, mean, var, scale, dtype)


def _roles(inputs: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place, name in enumerate(inputs):
        yield (input_role(place, len(inputs)), name)


def input_role(place: int, count: int) -> str:
    return "input" if count == 1 else f"input-{place}"


def _row(record: OpRecord, role: str, seen: Summary | None, qtype: QType) -> StatisticsRow:
    return row_of(record.index, record.title, record.type_name, role, seen, qtype.scale, qtype.format)


def _parameter_row(index: int, module: str, module_type: str, one: Parameter) -> StatisticsRow:
    return row_of(index, module, module_type, one.role, summary_of(one.values), shown_scale(one.scales), one.dtype)


def write_statistics(table: StatisticsTable, mode: str, folder: Path) -> None:
    """``statistics-<mode>.csv`` and ``statistics-<mode>-by-range.csv``."""
    write_text(folder / f"statistics-{mode}.csv", table.csv())
    write_text(folder / f"statistics-{mode}-by-range.csv", table.by_range().csv())


def statistics_of(
    captures: Sequence[Capture], parameters: Mapping[str, Mapping[str, Sequence[Parameter]]]
) -> dict[str, StatisticsTable]:
    """The tables of captures of one set of batches by mode; ``parameters`` by mode and op."""
    inputs = {name: seen for one in captures for name, seen in network_inputs(one).items()}
    return {one.mode: statistics_table(one, parameters.get(one.mode), inputs) for one in captures}
