"""A page of its own for a compiled Program: roofline, timeline and the table of its ops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatlib.analysis.report.environment import environment
from qatlib.analysis.report.sections import perf_table
from qatlib.atomic import write_text
from qatlib.errors import OutputError

if TYPE_CHECKING:
    from qatlib.compiler import Executable


def visualize_model(executable: Executable, path: str | Path) -> None:
    """Write roofline, timeline and per-op table of a compiled Program into one HTML file that needs no other.

    All figures are estimates of the model that the target file describes. Raises OutputError (QAT226) for a name that
    does not end with .html, and where nothing can be written.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise OutputError("QAT226", str(path), "is not the name of a page", "Let it end with .html")
    write_text(path, render_accelerator(executable.performance.to_dict()))


def render_accelerator(performance: Mapping[str, Any]) -> str:
    """The page as text, from the content of ``performance.json``."""
    title = f"Estimate for {performance['target']}"
    return environment().get_template("accelerator_page.html.j2").render(title=title, table=perf_table(performance))
