"""Cells of the per-op tables: text to show, and the key to sort by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qatlib.analysis.call_sites import APART, CallSite
from qatlib.analysis.op_facts import OpFact
from qatlib.analysis.records import OpRecord
from qatlib.atomic import write_csv


@dataclass(frozen=True)
class Cell:
    """``key`` is a number for numeric columns (None sorts last), else text. ``hint`` is shown on hover.

    ``name`` of an op, where ``text`` is none, and ``link`` its address in the page. ``red`` marks what has to do with
    modules that are called several times.
    """

    text: str
    key: float | str | None
    hint: str = ""
    name: str = ""
    link: str = ""
    red: bool = False


def show(value: object, digits: int = 4) -> str:
    """A value for people: ``digits`` significant digits, a dash for None, ∞ for infinity."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        return f"{value:.{digits}g}"
    return str(value)


def number(value: float | None, digits: int = 4, suffix: str = "") -> Cell:
    """A number with ``digits`` significant digits; None is a dash and sorts last."""
    if value is None:
        return Cell("–", None)
    key = value if math.isfinite(value) else math.copysign(1e300, value)
    return Cell(show(float(value), digits) + suffix, key)


def fixed(value: float | None, decimals: int) -> Cell:
    """Aligned decimals: for columns whose values lie close together."""
    if value is None or not math.isfinite(value):
        return number(value)
    return Cell(f"{value:.{decimals}f}", value)


def op_columns() -> tuple[tuple[str, str], ...]:
    """(heading, explanation) of the capture tables."""
    return (
        ("#", "Place in forward order"),
        ("Module", "Module that computes it, with the call number of a shared one"),
        ("Type", "Module or function"),
        ("Format", "Output format"),
        ("qscale", "Output scale"),
        ("Min", "Smallest reference output"),
        ("Max", "Largest reference output"),
        ("Cosine", "Similarity of outputs, each model on its own values"),
        ("Acc. SQNR dB", "Signal to error, each model on its own values; higher is better"),
        ("Acc. error", "Largest absolute difference, in the output's unit"),
        ("Acc. error LSB", "The same in output steps"),
        ("Op SQNR dB", "Signal to error of this op alone, given the same input; higher is better"),
        ("Op error LSB", "Largest difference of this op alone, in output steps"),
        ("Codes differ", "Share of output codes that differ, given the same input"),
    )


def op_cells(record: OpRecord) -> tuple[Cell, ...]:
    acc, same, seen = record.accumulated, record.same_input, record.reference
    share = same.differing_share if same else None
    kind = record.type_name.rpartition(".")[2]
    return (
        Cell(str(record.index), record.index),
        Cell(record.title, record.title.lower(), record.name, name=record.name),
        Cell(kind, kind.lower(), record.module_type),
        Cell(record.qtype.dtype, record.qtype.dtype),
        number(record.scale),
        number(seen.min if seen else None),
        number(seen.max if seen else None),
        fixed(acc.cosine if acc else None, 5),
        fixed(acc.sqnr_db if acc else None, 1),
        number(acc.max_abs if acc else None),
        number(acc.max_lsb if acc else None, 3),
        fixed(same.sqnr_db if same else None, 1),
        number(same.max_lsb if same else None, 3),
        number(None if share is None else 100.0 * share, 3, " %"),
    )


def table_columns() -> tuple[tuple[str, str], ...]:
    return (
        ("Op", "Op of the Program that reads the table"),
        ("Function", "What is tabulated"),
        ("Input", "Format of the codes that are looked up"),
        ("Division", "How the range is divided: exact (one entry per code), uniform, curvature or given"),
        ("Segments", "Parts of one spacing each"),
        ("Entries", "Numbers stored"),
        ("Worst LSB", "Largest error over all input codes that can occur, in output steps; rounding alone is 0.5"),
        ("Mean LSB", "Mean error over the same codes, in output steps"),
    )


def table_values(op: OpFact) -> tuple[str | int | float, ...]:
    """The values behind :func:`table_columns`."""
    seen = op.table
    assert seen is not None
    return (
        op.where,
        seen.function,
        seen.input_dtype,
        seen.division,
        seen.segments,
        seen.entries,
        seen.worst_lsb,
        seen.mean_lsb,
    )


def table_cells(op: OpFact) -> tuple[Cell, ...]:
    values = table_values(op)
    words = [Cell(str(value), str(value).lower(), op.module if i == 0 else "") for i, value in enumerate(values[:4])]
    return (
        *words,
        *(number(float(value), 3) if isinstance(value, float) else Cell(str(value), value) for value in values[4:]),
    )


def write_tables(ops: Sequence[OpFact], path: Path) -> None:
    """Comma-separated text, one line per table, worst first."""
    write_csv(path, (name for name, _ in table_columns()), map(table_values, tables_of(ops)))


def tables_of(ops: Sequence[OpFact]) -> list[OpFact]:
    """The ops that have a table, largest worst error first."""
    return sorted((op for op in ops if op.table), key=lambda op: -op.table.worst_lsb if op.table else 0.0)


def fuse_columns() -> tuple[tuple[str, str], ...]:
    return (
        ("Op", "What stayed an op of its own"),
        ("Type", "Module or function"),
        ("Pattern", "What it could have been part of; empty if there is no convolution or linear before it"),
        ("Why not", "What is in the way"),
        ("Change", "Edit of the model; empty where nothing is to be gained"),
        ("Line", "Line of the model's source"),
    )


def call_columns() -> tuple[tuple[str, str], ...]:
    return (
        ("Module", "Module that is called several times"),
        ("Type", "Its type"),
        ("Call", "Which call, of how many"),
        ("Op", "What computes the call"),
        ("Input min", "Smallest input, in float; a dash for what comes later in a fused op"),
        ("Input max", "Largest input"),
        ("Min", "Smallest output of the op, in float"),
        ("Max", "Largest output of the op"),
        ("qscale", "Output scale of this call"),
        ("Of the widest", "Largest magnitude over that of the widest call"),
    )


def call_cells(site: CallSite) -> tuple[Cell, ...]:
    ranges = (site.input_min, site.input_max, site.output_min, site.output_max)
    apart = site.ratio is not None and site.ratio * APART < 1
    return (
        Cell(site.module, site.module, name=site.op),
        Cell(site.type.rpartition(".")[2], site.type, site.type),
        Cell(f"{site.call} of {site.calls}", float(site.call)),
        Cell(site.op, site.op),
        *(number(value) for value in ranges),
        number(site.scale, 6),
        replace(number(site.ratio), red=apart),
    )


def perf_columns(wide: bool) -> tuple[tuple[str, str], ...]:
    """``wide``: with what int16 costs."""
    return (
        ("Op", "Value that the op writes"),
        ("Kind", "Kind of Program op"),
        ("Unit", "Part of the accelerator that computes it"),
        ("Latency µs", "Estimated time"),
        ("Share", "Share of the whole latency"),
        ("MACs", "Multiply-accumulates"),
        ("Compute µs", "Time that the busier of the units that compute works"),
        ("of it", "The same as a share of the op's latency"),
        ("Load, store µs", "Time that the busier of the buses to SRAM and DRAM works; both go on at once"),
        ("of it", "The same as a share of the op's latency"),
        *((("int16 µs", "Time that formats of 16 bits cost, against 8 bits in the same places"),) if wide else ()),
        ("SRAM bytes", "Bytes moved in on-chip memory"),
        ("DRAM bytes", "Bytes moved to and from off-chip memory, weights included"),
        ("Bound by", "What limits it"),
        ("Array use", "Multiply-accumulates over what the array could do in that time"),
    )


def digits(value: float) -> str:
    """Four significant digits, and never a power of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def perf_cells(op: Mapping[str, Any], total_us: float, wide: bool) -> tuple[Cell, ...]:
    def time(us: float) -> Cell:
        return Cell(digits(us), us)

    def share(part: float) -> Cell:
        return Cell(f"{100.0 * part:.1f} %", part)

    per_cycle = float(op["latency_us"]) / op["cycles"] if op["cycles"] else 0.0
    return (
        Cell(op["op"], str(op["op"]).lower(), op["module"]),
        Cell(op["kind"], op["kind"]),
        Cell(op["unit"], op["unit"]),
        time(float(op["latency_us"])),
        share(float(op["latency_us"]) / total_us if total_us else 0.0),
        Cell(f"{op['macs']:,}", op["macs"]),
        time(float(op["compute_us"])),
        share(float(op["compute_share"])),
        time(float(op["load_store_us"])),
        share(float(op["load_store_share"])),
        *((time(op["int16_cycles"] * per_cycle),) if wide else ()),
        *(Cell(f"{op[key]:,}", op[key]) for key in ("sram_bytes", "dram_bytes")),
        Cell(op["bound"], op["bound"]),
        share(float(op["utilization"])),
    )
