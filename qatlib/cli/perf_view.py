"""A Program on several targets, for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qatlib.compiler.perf import BASIS
from qatlib.compiler.table import HEADINGS, TargetRow, cells

LAST, SUMMARY = Path("artifacts/program"), Path("reports/summary.json")


def table(rows: Sequence[TargetRow], ratio: str = "") -> Group:
    """For ``rich.print``: a line per target, and below it the first refusal of each that refuses."""
    shown = Table(title="Estimates per target, batch 1", title_justify="left")
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading in ("target", "refused") else "right", overflow="fold")
    lines = Text(ratio)
    for row in rows:
        shown.add_row(*cells(row))
        if row.refusals:
            more = f" (and {len(row.refusals) - 1} more: --json)" if len(row.refusals) > 1 else ""
            lines.append(f"{row.target}: {row.refusals[0]}{more}\n")
    return Group(shown, lines.append(f"{BASIS}.".capitalize()))


def accuracy_ratio(summary: Path = SUMMARY) -> float | None:
    """Of the integers to float, as the last run scored them; None where there is no fresh score."""
    try:
        document = json.loads(summary.read_text(encoding="utf-8"))
        value = None if "integer" in document["stale"] else document["ratio"].get("integer")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def ratio_line(program: Path) -> str:
    """A sentence on the Program of the last run: its integers are the same on every target that takes them."""
    ratio = accuracy_ratio() if program == LAST else None
    return "" if ratio is None else f"Accuracy of its integers: {ratio:.4f} of float, the same on every target.\n"
