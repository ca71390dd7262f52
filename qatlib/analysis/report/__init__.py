"""The one HTML page that people open after a run."""

from __future__ import annotations

from qatlib.analysis.report.page import ReportData, render, write_report

__all__ = ["ReportData", "render", "write_report"]
