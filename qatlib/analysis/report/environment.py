"""What all pages are rendered with."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from qatlib.analysis.report.tables import show


def environment() -> Environment:
    """Of the templates in ``assets``; what is undefined is an error."""
    made = Environment(
        loader=PackageLoader("qatlib.analysis.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["show"] = show
    return made
