"""The tables of the page, each with its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qatlib.analysis.call_sites import CallSite
from qatlib.analysis.op_facts import OpFact
from qatlib.analysis.records import STAGES_OF, Capture
from qatlib.analysis.report.accelerator import Accelerator, accelerator
from qatlib.analysis.report.names import Ops, address, anchor
from qatlib.analysis.report.plots import depth_plot
from qatlib.analysis.report.study import (
    SHOWN,
    conversion_table,
    sensitivity_table,
    share_bars,
    step_curve,
    step_table,
)
from qatlib.analysis.report.tables import (
    Cell,
    call_cells,
    call_columns,
    fuse_columns,
    op_cells,
    op_columns,
    perf_cells,
    perf_columns,
    table_cells,
    table_columns,
    tables_of,
)
from qatlib.analysis.unfused import Unfused

if TYPE_CHECKING:
    from qatlib.analysis.study import Study

_HIGHER = "SQNR in dB, higher is better"


@dataclass(frozen=True)
class OpTable:
    """``inner`` says of each row whether it is an inner step of a composite, which is folded away at first, and ``ids``
    what it is known by, if that is not taken by a table above.

    ``legend`` of the plot: pairs of CSS class and words.
    """

    anchor: str
    link: str
    title: str
    note: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    inner: Sequence[bool] = ()
    ids: Sequence[str] = ()
    plot: str = ""
    legend: Sequence[tuple[str, str]] = ()
    unmeasured: Sequence[tuple[str, str, str]] = ()
    accelerator: Accelerator | None = None


def capture_table(capture: Capture, ops: Ops) -> OpTable:
    reference, other = STAGES_OF[capture.mode]
    return OpTable(
        anchor=capture.mode,
        link=capture.mode,
        title=f"{reference.capitalize()} against {other}, op by op",
        note=f"{capture.mode}, {capture.samples} samples, batches: {capture.batches}. For the accumulated error each "
        "model runs on its own values; the op error gives both the same input. 1 LSB is one step of the output scale.",
        columns=op_columns(),
        rows=[op_cells(record) for record in capture.records],
        inner=inner_steps(capture),
        ids=[anchor(record.name) if ops.first[record.name] is record else "" for record in capture.records],
        plot=depth_plot(capture),
        legend=(("acc", "accumulated"), ("op", "op alone, same input"), ("", _HIGHER)),
        unmeasured=[(item.name, item.what, item.why) for item in capture.unmeasured],
    )


def inner_steps(capture: Capture) -> list[bool]:
    """For every record whether it is a step of a composite before its last, by which the whole is judged."""
    last = {record.composite: record.name for record in capture.records}
    return [bool(record.composite) and last[record.composite] != record.name for record in capture.records]


def table_table(ops: Sequence[OpFact]) -> OpTable:
    return OpTable(
        anchor="tables",
        link="Tables",
        title="Tables of functions",
        note="Errors against the function in float64, over all input codes that can occur, whether the data has them or"
        " not. 1 LSB is one step of the output scale; an exact table shows at most 0.5, its rounding.",
        columns=table_columns(),
        rows=[table_cells(op) for op in tables_of(ops)],
    )


def fuse_table(rows: Sequence[Unfused]) -> OpTable:
    shown = [(row.op, row.type, row.pattern, row.seen, row.fix, row.where) for row in rows]
    return OpTable(
        anchor="fuse",
        link="Fusion",
        title="What stayed unfused",
        note="Batch norms, adds and activations that are ops of their own, each with a rounding, and why.",
        columns=fuse_columns(),
        rows=[[Cell(text, text.lower()) for text in row] for row in shown],
    )


def call_table(sites: Sequence[CallSite]) -> OpTable:
    return OpTable(
        anchor="calls",
        link="Calls",
        title="Modules that are called several times",
        note="Every call has a scale of its own here. The last column is red where a call has less than a quarter of"
        " the widest one's range: with one scale for all it would lose two bits or more.",
        columns=call_columns(),
        rows=[call_cells(site) for site in sites],
    )


def study_tables(study: Study) -> list[OpTable]:
    seen, steps, lost = study.sensitivity, study.steps, study.conversion
    columns, rows = sensitivity_table(seen)
    correlation = (
        "" if seen.correlation is None else f" Their ranks and the scores' correlate by {seen.correlation:.2f}."
    )
    tables = [
        OpTable(
            anchor="sensitivity",
            link="Sensitivity",
            title="What rounding each op costs at the output",
            note=f"{seen.samples} samples; with everything rounded the outputs have {seen.whole.sqnr_db:.1f} dB,"
            " against the same weights in float. Shares need not add up to 100 %: errors cancel and grow."
            f"{correlation}",
            columns=columns,
            rows=rows,
            plot=share_bars(seen),
            legend=(("", f"share of the error power at the output, the {SHOWN} largest"),),
            unmeasured=[(item.name, item.what, item.why) for item in seen.unmeasured],
        )
    ]
    if steps is not None:
        columns, rows = step_table(steps)
        tables.append(
            OpTable(
                anchor="steps",
                link="Steps",
                title="Rounding one more op at a time",
                note=f"{steps.samples} samples: the first k ops rounded and the rest float, and each op alone.",
                columns=columns,
                rows=rows,
                plot=step_curve(steps),
                legend=(("acc", "first k rounded"), ("op", "this op alone"), ("", _HIGHER)),
            )
        )
    if lost is not None:
        columns, rows = conversion_table(lost)
        tables.append(
            OpTable(
                anchor="conversion",
                link="Conversion",
                title="What each op loses in integers",
                note=f"{lost.samples} samples; the integer outputs have {lost.whole.sqnr_db:.1f} dB against fake-quant."
                f" With the ops that explain it in fake-quant form they would have {lost.preserved.sqnr_db:.1f} dB.",
                columns=columns,
                rows=rows,
                unmeasured=[(item.name, item.what, item.why) for item in lost.unmeasured],
            )
        )
    return tables


def perf_table(performance: Mapping[str, Any]) -> OpTable:
    total = float(performance["latency_us"])
    wide = any(op["int16_cycles"] for op in performance["ops"])
    return OpTable(
        anchor="performance",
        link="Accelerator",
        title="On the accelerator",
        note=f"Target {performance['target']}, one inference, batch 1. Every figure is an {performance['basis']};"
        f" where its numbers come from: {performance['source']}.",
        columns=perf_columns(wide),
        rows=[perf_cells(op, total, wide) for op in performance["ops"]],
        accelerator=accelerator(performance),
    )


def linked(table: OpTable, ops: Ops) -> OpTable:
    """The same table with a link at the name of each op, which is in its first column of words.

    Names of modules that are called several times are red.
    """
    if not table.rows:
        return table
    column = next(i for i, cell in enumerate(table.rows[0]) if isinstance(cell.key, str))

    def named(cell: Cell) -> Cell:
        found = ops.find(cell.name or cell.text)
        return replace(cell, link=address(found[0]), red=bool(ops.first[found[0]].call)) if found else cell

    rows = [[named(cell) if i == column else cell for i, cell in enumerate(row)] for row in table.rows]
    return replace(table, rows=rows)
