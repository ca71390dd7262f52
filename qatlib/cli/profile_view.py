"""What the profiler found, for the terminal: the ops with the largest error of their own, and the findings."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qatlib.analysis.findings import SEVERITY_STYLES, Finding
from qatlib.analysis.records import STAGES_OF

SHOWN = 10
COLUMNS = {
    "module": "Module Name",
    "type": "Module Type",
    "cosine": "Similarity (Cosine)",
    "scale": "qscale",
    "error": "Acc Error (float atol)",
    "LSB": "Acc Error (N out_qscale)",
    "own LSB": "Op Error with Same Input (N out_qscale)",
}
"""Headings that fit a terminal, and those of the CSV file."""


def show(folder: Path, mode: str, findings: Sequence[Finding]) -> Group:
    """The head of ``similarity-<mode>-by-op-error.csv`` in ``folder``, for ``rich.print``."""
    with (folder / f"similarity-{mode}-by-op-error.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    reference, other = STAGES_OF[mode]
    table = Table(title=f"{reference} and {other}: ops by their own error", title_justify="left")
    for index, heading in enumerate(COLUMNS):
        words = index < 2
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows[:SHOWN]:
        row["Module Type"] = row["Module Type"].rpartition(".")[2]
        cells = [row[name] for name in COLUMNS.values()]
        table.add_row(*map(Text, cells[:2]), *(f"{float(cell):.4g}" if cell else "–" for cell in cells[2:]))
    if len(rows) > SHOWN:
        table.caption = f"and {len(rows) - SHOWN} more in {folder}"
    lines = Text()
    for finding in findings:
        lines.append(f"{finding.severity} {finding.code}", style=SEVERITY_STYLES[finding.severity])
        lines.append(f" {finding.module + ': ' if finding.module else ''}{finding.title}\n")
    if not findings:
        lines.append("No finding.\n")
    return Group(table, lines.append(f"page: {folder / 'profiler.html'}"))
