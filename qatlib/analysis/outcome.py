"""Everything the analyze stage leaves in ``reports/``, from one set of facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group

from qatlib.analysis.call_sites import write_shared
from qatlib.analysis.document import OPS, analysis_document
from qatlib.analysis.facts import STAGES, Facts
from qatlib.analysis.findings import Finding, Found
from qatlib.analysis.goals import GoalResult
from qatlib.analysis.ignore import set_aside
from qatlib.analysis.report import ReportData, write_report
from qatlib.analysis.report.tables import write_tables
from qatlib.analysis.rules import run_rules
from qatlib.analysis.similarity import write_similarity
from qatlib.analysis.statistics import write_statistics
from qatlib.analysis.study import write_study
from qatlib.analysis.summary import build_summary, goal_results
from qatlib.analysis.unfused import write_unfused
from qatlib.analysis.views import summary_markdown, terminal_table
from qatlib.atomic import write_json, write_text


@dataclass(frozen=True)
class Outcome:
    """What was found; :meth:`table` is for ``rich.print``."""

    summary: Mapping[str, Any]
    found: Found
    goals: tuple[GoalResult, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Without those that ``analyze.ignore`` names."""
        return self.found.findings

    @property
    def notes(self) -> tuple[str, ...]:
        return self.found.notes

    def table(self, report: str = "reports/profiler.html") -> Group:
        return terminal_table(self.summary, self.found, self.goals, report)


def publish(
    facts: Facts,
    folder: str | Path = "reports",
    performance: Mapping[str, Any] | None = None,
    expected: Sequence[str] = STAGES,
) -> Outcome:
    """Write ``summary.json``, ``summary.md``, ``findings.json``, ``analysis.json``, ``profiler.html``, ``tables.csv``,
    ``fuse.csv``, ``shared.csv``, the statistics and similarity tables, and in ``analyze/`` those of a study.

    ``performance`` is the content of a compile estimate (``Performance.to_dict()``); empty or None where there is none.
    """
    folder, performance = Path(folder), performance or None
    found = set_aside(run_rules(facts), facts.ignore)
    if facts.study is not None:
        found = replace(found, notes=(*found.notes, *facts.study.notes))
    summary = build_summary(facts, found.findings, None if performance is None else performance["latency_us"], expected)
    goals = goal_results(summary, facts)
    captures = tuple(seen for seen in (facts.fvsq, facts.qvsq) if seen is not None)
    write_json(folder / "summary.json", summary)
    write_json(folder / "findings.json", found.document())
    write_json(folder / "analysis.json", analysis_document(facts, found), rows=OPS)
    write_text(folder / "summary.md", summary_markdown(summary, found, goals))
    for seen in captures:
        write_similarity(seen, folder)
    for mode, table in facts.statistics.items():
        write_statistics(table, mode, folder)
    write_shared(facts.shared, folder / "shared.csv")
    write_tables(facts.ops, folder / "tables.csv")
    write_unfused(facts.unfused, folder / "fuse.csv")
    write_study(facts.study, folder / "analyze")
    shown = ReportData(
        found, captures, summary, goals, performance, facts.ops, facts.unfused, facts.study, facts.shared
    )
    write_report(folder / "profiler.html", shown)
    return Outcome(summary, found, goals)
