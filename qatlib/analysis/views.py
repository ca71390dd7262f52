"""Summary and findings for people: Markdown for a pull request, one table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qatlib.analysis.facts import STAGE_TITLES
from qatlib.analysis.findings import SEVERITY_STYLES, Finding, Found, evidence_text, severity_counts
from qatlib.analysis.goals import GoalResult

SHOWN = 5


def stage_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(stage, metric, ratio to float, images) as text; a stage without metrics shows why."""
    rows = []
    for stage, title in STAGE_TITLES.items():
        if stage in summary.get("missing", ()):
            rows.append((title, "missing", "", ""))
        elif stage in summary:
            numbers, ratio = summary[stage], 1.0 if stage == "float" else summary["ratio"].get(stage)
            mark = " (stale)" if stage in summary.get("stale", ()) else ""
            shown = "" if ratio is None else f"{ratio:.2%}"
            rows.append((title, f"{numbers[summary['metric']]:.4f}{mark}", shown, str(numbers.get("images", ""))))
    return rows


def summary_markdown(summary: Mapping[str, Any], found: Found, goals: Sequence[GoalResult]) -> str:
    """Markdown for a pull request: the stages, the goals, the worst findings with edit and command."""
    lines = [
        "## Quantization summary",
        "",
        f"| stage | {summary['metric']} | ratio to float | images |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in stage_rows(summary)]
    if "latency_us" in summary:
        lines += ["", f"Estimated latency: {summary['latency_us']:g} µs."]
    lines += ["", "### Goals", ""] + ([_goal_line(result) for result in goals] or ["None set."])
    counts = ", ".join(f"{summary['findings'][name]} {name}" for name in severity_counts(()))
    lines += ["", f"### Findings ({counts})", ""]
    for finding in found.findings[:SHOWN]:
        lines += _finding_lines(finding)
    if not found.findings:
        lines += ["No finding.", ""]
    if len(found.findings) > SHOWN:
        lines += [f"{len(found.findings) - SHOWN} more in `reports/profiler.html`.", ""]
    if found.ignored:
        lines.append(f"{len(found.ignored)} ignored, with reasons in `reports/profiler.html`.")
    return "\n".join(lines).rstrip() + "\n"


def _goal_line(result: GoalResult) -> str:
    value = "missing" if result.value is None else f"{result.value:.6g}"
    return f"- {'passed' if result.met else '**failed**'}: `{result.text}`, is {value}"


def _finding_lines(finding: Finding) -> list[str]:
    where = f" `{finding.module}`" if finding.module else ""
    # The page is named, not linked: from a folder of reports, a relative link would lead nowhere.
    head = f"**{finding.severity} {finding.code}**{where}: {finding.title} (`{finding.page}`)"
    lines = [head, "", f"Evidence: {evidence_text(finding)}", ""]
    if finding.edit:
        lines += ["```yaml" if ":" in finding.edit.split("\n", 1)[0] else "```text", finding.edit, "```", ""]
    if finding.command:
        lines += ["```sh", finding.command, "```", ""]
    return lines


def terminal_table(
    summary: Mapping[str, Any],
    found: Found,
    goals: Sequence[GoalResult],
    report: str = "reports/profiler.html",
) -> Group:
    """What ``make repro`` prints at the end, for ``rich.print``."""
    table = Table(title="Quantization summary", title_justify="left")
    for column in ("stage", str(summary["metric"]), "ratio to float", "images"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in stage_rows(summary):
        table.add_row(*row)
    lines = Text()
    if "latency_us" in summary:
        lines.append(f"latency (estimate): {summary['latency_us']:g} µs\n")
    for result in goals:
        lines.append("goal ")
        lines.append("passed" if result.met else "FAILED", style="green" if result.met else "bold red")
        lines.append(f": {result.text}, is {'missing' if result.value is None else format(result.value, '.6g')}\n")
    for finding in found.findings[:SHOWN]:
        lines.append(f"{finding.severity} {finding.code}", style=SEVERITY_STYLES[finding.severity])
        lines.append(f" {finding.module + ': ' if finding.module else ''}{finding.title}\n  try: {finding.command}\n")
    if found.ignored:
        lines.append(f"ignored findings: {len(found.ignored)}\n")
    lines.append("".join(f"{note}\n" for note in found.notes))
    lines.append(f"report: {report}")
    return Group(table, lines)
