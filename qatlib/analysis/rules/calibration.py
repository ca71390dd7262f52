"""How much calibration lost against float: too much to tune away, or within reach."""

from __future__ import annotations

from qatlib.analysis.edits import set_values
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule

UNSOUND = 0.80
"""Below this share of the float metric the tuning guide suspects the float model first."""
DEFAULT_GOAL = 0.99
"""Ratio asked of a stage when params.yaml sets no goal for it."""


@rule("QAT001", guide="G5")
def calibration_collapsed(facts: Facts) -> list[Finding]:
    ratio = facts.ratio("calib")
    if ratio is None or ratio >= UNSOUND:
        return []
    edit = set_values({"calibrate.method": "mse", "calibrate.batches": 64})
    return [
        Finding(
            "QAT001",
            "error",
            f"Calibrated model keeps {ratio:.1%} of the float metric, below 80 %: check the float model "
            "first, then the ops with the largest error",
            evidence={"float": facts.value("float") or 0.0, "calib": facts.value("calib") or 0.0, "ratio": ratio},
            edit=edit.yaml,
            command=edit.command,
        )
    ]


@rule("QAT002", guide="G4")
def calibration_below_goal(facts: Facts) -> list[Finding]:
    ratio, goal = facts.ratio("calib"), facts.goal_minimum("ratio.calib", DEFAULT_GOAL)
    if ratio is None or not UNSOUND <= ratio < goal:
        return []
    edit = set_values({"calibrate.method": "mse", "calibrate.batches": 64})
    trained = facts.value("qat") is not None
    return [
        Finding(
            "QAT002",
            "info" if trained else "warning",
            "Calibration alone misses its goal: tune the method, batches and data of calibration, then train (QAT)",
            evidence={"ratio": ratio, "goal": goal, "missing": goal - ratio},
            edit=edit.yaml,
            command=edit.command,
        )
    ]
