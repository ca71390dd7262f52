"""What calibration lost against float, too much to tune away or within reach, and whether its data can be trusted."""

from __future__ import annotations

from qatlib.analysis.edits import set_values
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.fake.ranges import OUTSIDE

UNSOUND = 0.80
"""Below this share of the float metric the tuning guide suspects the float model first."""
FEW = 100
"""Fewer samples than this leave the rare large values of a range to chance."""
WIDE = 0.5
"""Half of all activations use less than this share of their calibrated range on other data: not the same data."""
MANY = 0.1
"""Share of activations that leave their calibrated range from which on the data, not a single tensor, is at fault."""
DEFAULT_GOAL = 0.99
"""Ratio asked of a stage when params.yaml sets no goal for it."""


@rule("QAT001", guide="G5", symptom=True)
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
            predicted=facts.predicted_by("mse"),
        )
    ]


@rule("QAT002", guide="G4", symptom=True)
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
            predicted=facts.predicted_by("mse"),
        )
    ]


@rule("QAT032", guide="G7")
def few_calibration_samples(facts: Facts) -> list[Finding]:
    samples = facts.value("calib", "calibration_images")
    if samples is None or samples >= FEW:
        return []
    edit = set_values({"calibrate.batches": 64})
    return [
        Finding(
            "QAT032",
            "info",
            f"Calibration saw {samples:.0f} samples, fewer than {FEW}: ranges are left to chance. Look at more batches,"
            " and give the calib split more items if it ends before",
            evidence={"calibration_images": int(samples), "advised": FEW},
            edit=edit.yaml,
            command=edit.command,
        )
    ]


@rule("QAT033", guide="G7")
def calibration_data_unlike_held_out(facts: Facts) -> list[Finding]:
    outside = [r for r in facts.ranges if r.outside]
    if outside:
        worst = min(outside, key=lambda r: r.covered)
        edit = set_values({"calibrate.batches": 64})
        return [
            Finding(
                "QAT033",
                "warning" if len(outside) > MANY * len(facts.ranges) else "info",
                f"Validation data leaves the calibrated range of {len(outside)} of {len(facts.ranges)} activations by"
                f" more than {OUTSIDE:.0%}: calibrate on more, or more representative, data",
                module=worst.op,
                evidence={
                    "tensors_outside": len(outside),
                    "tensors": len(facts.ranges),
                    "calibrated_largest": worst.largest,
                    "held_out_largest": worst.held_largest,
                    "covered": worst.covered,
                },
                edit=edit.yaml,
                command=edit.command,
            )
        ]
    typical = facts.value("calib", "held_out_median_range")
    if typical is None or typical >= WIDE:
        return []
    return [
        Finding(
            "QAT033",
            "warning",
            f"Validation data fills {typical:.0%} of the calibrated ranges (median of all activations): the rest of the"
            " codes is spent on values that do not come",
            evidence={"median_range_ratio": typical},
            edit="Prepare the items of the calib split as those of the val split: same sources, same normalization",
            command="dvc repro --force --single-item calibrate",
        )
    ]
