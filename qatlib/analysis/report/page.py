"""Builds ``profiler.html``: one self-contained file, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qatlib.analysis.findings import Found, severity_counts
from qatlib.analysis.goals import GoalResult
from qatlib.analysis.op_facts import OpFact
from qatlib.analysis.records import STAGES_OF, Capture
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
    fuse_columns,
    op_cells,
    op_columns,
    perf_cells,
    perf_columns,
    show,
    table_cells,
    table_columns,
    tables_of,
)
from qatlib.analysis.report.waterfall import Waterfall, waterfall
from qatlib.analysis.unfused import Unfused
from qatlib.atomic import write_text

if TYPE_CHECKING:
    from qatlib.analysis.study import Study

OPEN = 3
"""Findings shown unfolded."""


@dataclass(frozen=True)
class ReportData:
    """What the page shows; a part that is empty or None is left out.

    ``summary`` is the content of summary.json, ``performance`` that of a compile estimate (``Performance.to_dict()``),
    ``ops`` the facts of the Program, whose tables are listed, ``unfused`` what fusion left alone, ``study`` what
    ``analyze.sensitivity`` asked for.
    """

    found: Found = field(default_factory=Found)
    captures: Sequence[Capture] = ()
    summary: Mapping[str, Any] | None = None
    goals: Sequence[GoalResult] = ()
    performance: Mapping[str, Any] | None = None
    ops: Sequence[OpFact] = ()
    unfused: Sequence[Unfused] = ()
    study: Study | None = None
    title: str = "Quantization report"


_HIGHER = "SQNR in dB, higher is better"


@dataclass(frozen=True)
class _OpTable:
    """``inner`` says of each row whether it is an inner step of a composite, which is folded away at first.

    ``legend`` of the plot: pairs of CSS class and words.
    """

    anchor: str
    link: str
    title: str
    note: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    inner: Sequence[bool] = ()
    plot: str = ""
    legend: Sequence[tuple[str, str]] = ()
    unmeasured: Sequence[tuple[str, str, str]] = ()


def render(data: ReportData) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("qatlib.analysis.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    tables = [_capture_table(capture) for capture in data.captures]
    if tables_of(data.ops):
        tables.append(_table_table(data.ops))
    if data.unfused:
        tables.append(_fuse_table(data.unfused))
    if data.study is not None:
        tables += _study_tables(data.study)
    if data.performance is not None:
        tables.append(_perf_table(data.performance))
    loss: Waterfall | None = waterfall(data.summary) if data.summary is not None else None
    return environment.get_template("profiler.html.j2").render(
        title=data.title,
        loss=loss,
        summary=data.summary,
        goals=data.goals,
        found=data.found,
        counts=severity_counts(data.found.findings),
        open=OPEN,
        tables=tables,
    )


def write_report(path: str | Path, data: ReportData) -> None:
    write_text(path, render(data))


def _capture_table(capture: Capture) -> _OpTable:
    reference, other = STAGES_OF[capture.mode]
    return _OpTable(
        anchor=capture.mode,
        link=capture.mode,
        title=f"{reference.capitalize()} against {other}, op by op",
        note=f"{capture.mode}, {capture.samples} samples, batches: {capture.batches}. For the accumulated error each "
        "model runs on its own values; the op error gives both the same input. 1 LSB is one step of the output scale.",
        columns=op_columns(),
        rows=[op_cells(record) for record in capture.records],
        inner=inner_steps(capture),
        plot=depth_plot(capture),
        legend=(("acc", "accumulated"), ("op", "op alone, same input"), ("", _HIGHER)),
        unmeasured=[(item.name, item.what, item.why) for item in capture.unmeasured],
    )


def inner_steps(capture: Capture) -> list[bool]:
    """For every record whether it is a step of a composite before its last, by which the whole is judged."""
    last = {record.composite: record.name for record in capture.records}
    return [bool(record.composite) and last[record.composite] != record.name for record in capture.records]


def _table_table(ops: Sequence[OpFact]) -> _OpTable:
    return _OpTable(
        anchor="tables",
        link="Tables",
        title="Tables of functions",
        note="Errors against the function in float64, over all input codes that can occur, whether the data has them or"
        " not. 1 LSB is one step of the output scale; an exact table shows at most 0.5, its rounding.",
        columns=table_columns(),
        rows=[table_cells(op) for op in tables_of(ops)],
    )


def _fuse_table(rows: Sequence[Unfused]) -> _OpTable:
    shown = [(row.op, row.type, row.pattern, row.seen, row.fix, row.where) for row in rows]
    return _OpTable(
        anchor="fuse",
        link="Fusion",
        title="What stayed unfused",
        note="Batch norms, adds and activations that are ops of their own, each with a rounding, and why.",
        columns=fuse_columns(),
        rows=[[Cell(text, text.lower()) for text in row] for row in shown],
    )


def _study_tables(study: Study) -> list[_OpTable]:
    seen, steps, lost = study.sensitivity, study.steps, study.conversion
    columns, rows = sensitivity_table(seen)
    correlation = (
        "" if seen.correlation is None else f" Their ranks and the scores' correlate by {seen.correlation:.2f}."
    )
    tables = [
        _OpTable(
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
            _OpTable(
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
            _OpTable(
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


def _perf_table(performance: Mapping[str, Any]) -> _OpTable:
    total = sum(float(op["latency_us"]) for op in performance["ops"])
    return _OpTable(
        anchor="performance",
        link="Performance",
        title="Latency and traffic, op by op",
        note=f"Target {performance['target']}: {total:.4g} µs for one inference, batch 1. An {performance['basis']}.",
        columns=perf_columns(),
        rows=[perf_cells(op, total) for op in performance["ops"]],
    )
