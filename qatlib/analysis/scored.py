"""The stages that score the model. This module imports no torch."""

from __future__ import annotations

STAGES = ("float", "calib", "qat", "integer", "compiled")
"""Stages that score the model, in the order of the pipeline; roots of their metrics.json."""

STAGE_TITLES = {
    "float": "float",
    "calib": "calibrated",
    "qat": "QAT",
    "integer": "integer",
    "compiled": "compiled",
}
