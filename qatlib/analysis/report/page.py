"""Builds ``profiler.html``: one self-contained file, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatlib.analysis.call_sites import CallSite
from qatlib.analysis.findings import Found, severity_counts
from qatlib.analysis.goals import GoalResult
from qatlib.analysis.op_facts import OpFact
from qatlib.analysis.records import STAGES_OF, Capture
from qatlib.analysis.report.detail import detail_data
from qatlib.analysis.report.environment import environment
from qatlib.analysis.report.graph import error_text, graph_view
from qatlib.analysis.report.names import Ops, finding_anchors, ops_of
from qatlib.analysis.report.plots import CEILING_DB
from qatlib.analysis.report.sections import (
    OpTable,
    call_table,
    capture_table,
    fuse_table,
    linked,
    perf_table,
    study_tables,
    table_table,
)
from qatlib.analysis.report.tables import tables_of
from qatlib.analysis.report.waterfall import Waterfall, waterfall
from qatlib.analysis.similarity import worst
from qatlib.analysis.unfused import Unfused
from qatlib.atomic import write_text

if TYPE_CHECKING:
    from qatlib.analysis.study import Study

OPEN, WORST = 3, 3
"""Findings shown unfolded, and ops named as those with the largest errors."""


@dataclass(frozen=True)
class ReportData:
    """What the page shows; a part that is empty or None is left out.

    ``summary`` is the content of summary.json, ``performance`` that of a compile estimate (``Performance.to_dict()``),
    ``ops`` the facts of the Program, whose tables are listed, ``unfused`` what fusion left alone, ``study`` what
    ``analyze.sensitivity`` asked for, ``calls`` those of modules that are called several times.
    """

    found: Found = field(default_factory=Found)
    captures: Sequence[Capture] = ()
    summary: Mapping[str, Any] | None = None
    goals: Sequence[GoalResult] = ()
    performance: Mapping[str, Any] | None = None
    ops: Sequence[OpFact] = ()
    unfused: Sequence[Unfused] = ()
    study: Study | None = None
    calls: Sequence[CallSite] = ()
    title: str = "Quantization report"


def render(data: ReportData) -> str:
    """The page as text."""
    ops = ops_of(data.captures)
    found = data.found.findings
    loss: Waterfall | None = waterfall(data.summary) if data.summary is not None else None
    return (
        environment()
        .get_template("profiler.html.j2")
        .render(
            title=data.title,
            loss=loss,
            summary=data.summary,
            goals=data.goals,
            found=data.found,
            findings=list(zip(finding_anchors(found), found, strict=True)),
            counts=severity_counts(found),
            open=OPEN,
            worst=_worst(data.captures, ops),
            graph=graph_view(ops),
            details=detail_data(data.captures, ops, found) if ops.first else None,
            link=ops.link,
            tables=[linked(table, ops) for table in _tables(data, ops)],
        )
    )


def _tables(data: ReportData, ops: Ops) -> list[OpTable]:
    tables = [capture_table(capture, ops) for capture in data.captures]
    if tables_of(data.ops):
        tables.append(table_table(data.ops))
    if data.calls:
        tables.append(call_table(data.calls))
    if data.unfused:
        tables.append(fuse_table(data.unfused))
    if data.study is not None:
        tables += study_tables(data.study)
    if data.performance is not None:
        tables.append(perf_table(data.performance))
    return tables


def _worst(captures: Sequence[Capture], ops: Ops) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """For each capture the ops of the largest errors: title, address and error; equal ones are left out."""
    found = []
    for capture in captures:
        records = [r for r in worst(capture.records, WORST) if r.same_input and r.same_input.sqnr_db < CEILING_DB]
        named = [(record.title, ops.link(record.name), error_text(record)) for record in records]
        found.append((" and ".join(STAGES_OF[capture.mode]), named))
    return [(stages, named) for stages, named in found if named]


def write_report(path: str | Path, data: ReportData) -> None:
    write_text(path, render(data))
