"""Findings of ``analyze.sensitivity``: where the error at the output comes from, measured op by op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatlib.analysis.edits import Edit, input_format, named, override, set_values
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding, finite
from qatlib.analysis.rules import rule
from qatlib.analysis.rules.calibration import DEFAULT_GOAL

if TYPE_CHECKING:
    from qatlib.analysis.sensitivity import Sensitivity, Trial

HALF, THIRD = 1 / 2, 1 / 3
"""Share of the error power at the output that makes one op a cause of its own; a third where the goal is missed."""
FAIR = 3.0
"""What an op has to make of the error, over the share of one if all made alike: of two ops, a half is no news."""
MOST = 3
LOUD_DB = 20.0
"""SQNR of outputs below which an error is worth naming: a tenth of the values. Measured: docs/rules/QAT036.md."""
ALIKE = 0.8
"""An edit that brings back this part of what float would is as good."""
ADDED = 1 / 2
"""Error power of conversion over that of rounding from which on it counts: 1.8 dB. The examples have up to 0.16."""
FAR = 20.0
"""Noise over that of the median sample, and error over that of the mean one. Sound models measure up to 8."""


@rule("QAT036", guide="G13, G18, G33, G40")
def one_op_makes_the_error(facts: Facts) -> list[Finding]:
    seen = facts.study.sensitivity if facts.study else None
    if seen is None:
        return []
    stage = facts.fake_quant_stage
    ratio = facts.ratio(stage)
    short = ratio is not None and ratio < facts.goal_minimum(f"ratio.{stage}", DEFAULT_GOAL)
    if seen.whole.sqnr_db >= LOUD_DB and not short:
        return []
    least = max(THIRD if short else HALF, FAIR / max(1, len(seen.scores)))
    causes = [trial for trial in seen.ranked("off") if trial.share >= least][:MOST]
    return [_cause(facts, seen, trial, short) for trial in causes]


def _cause(facts: Facts, seen: Sensitivity, off: Trial, short: bool) -> Finding:
    tried, edit, what = _cure(facts, seen, off)
    evidence: dict[str, float | int | str] = {
        "share_of_error": off.share,
        "output_sqnr_db": seen.whole.sqnr_db,
        "predicted_sqnr_db": tried.distance.sqnr_db,
        "predicted_gain_db": tried.distance.sqnr_db - seen.whole.sqnr_db,
        "images": seen.samples,
    }
    predicted = {"output_sqnr_db": tried.distance.sqnr_db - seen.whole.sqnr_db}
    if tried.distance.metric is not None and seen.whole.metric is not None:
        evidence["predicted_metric_gain"] = predicted["metric"] = tried.distance.metric - seen.whole.metric
    return Finding(
        "QAT036",
        "warning" if short else "info",
        f"Rounding this op makes {off.share:.0%} of the error at the network's output; {what}",
        module=off.unit.name,
        evidence=evidence,
        edit=edit.yaml,
        command=edit.command,
        predicted=finite(predicted) if tried is not off or "hybrid:" in edit.yaml else {},
    )


def _cure(facts: Facts, seen: Sensitivity, off: Trial) -> tuple[Trial, Edit, str]:
    """The trial that an edit repeats, the edit, and what it does: 16 bits where they do what float would."""
    unit = off.unit
    wide = seen.find(unit.name, "int16", "activation")
    if wide and wide.share >= ALIKE * off.share:
        if unit.is_input:
            return wide, input_format(unit.name, facts.input_formats, activation="int16"), "give this input int16"
        return wide, override(unit.name, facts.overrides, activation="int16"), "give its output int16"
    weights = seen.find(unit.name, "int16", "weight")
    if weights and weights.share >= ALIKE * off.share:
        edit = override(unit.name, facts.overrides, weight="int16")
        return weights, edit, "give its weights int16, if the target takes them"
    if unit.is_input:
        edit = input_format(unit.name, facts.input_formats, activation="int16")
        return wide or off, edit, "give this input int16, or a scale that suits its range"
    return off, named("qat.hybrid", [unit.name], facts.hybrid), "16 bits do not bring it back: leave it in float"


@rule("QAT037", guide="G18, G41")
def few_ops_lose_in_conversion(facts: Facts) -> list[Finding]:
    study = facts.study
    if study is None or study.conversion is None:
        return []
    seen, rounding = study.conversion, study.sensitivity.whole.noise
    names = [unit.name for unit in seen.smallest if not unit.is_input]
    if not names or seen.whole.noise < ADDED * rounding or seen.preserved.noise > HALF * seen.whole.noise:
        return []
    edit = named("convert.preserve", names, facts.preserve)
    return [
        Finding(
            "QAT037",
            "warning",
            f"{len(names)} of {len(seen.trials)} ops in integers explain {seen.explained:.0%} of what conversion loses:"
            " see whether it comes back without them, then look at their tables and accumulators",
            module=seen.ranked()[0].unit.name,
            evidence={
                "ops": ", ".join(names),
                "explained": seen.explained,
                "integer_sqnr_db": seen.whole.sqnr_db,
                "predicted_sqnr_db": seen.preserved.sqnr_db,
                "images": seen.samples,
            },
            edit=edit.yaml,
            command=edit.command,
            predicted=finite({"conversion_sqnr_db": seen.preserved.sqnr_db - seen.whole.sqnr_db}),
        )
    ]


@rule("QAT038", guide="G7, G20")
def one_sample_far_off(facts: Facts) -> list[Finding]:
    found = []
    for mode, cases in facts.study.bad_cases if facts.study else ():
        far = (case for case in cases.worst if case.sqnr_db < LOUD_DB and case.share * cases.samples >= FAR)
        worst = next((case for case in far if cases.times_median(case) >= FAR), None)
        if worst is None:
            continue
        edit = set_values({"calibrate.batches": 64})
        sides = "float and calibrated" if mode == "FvsQ" else "fake-quant and integer"
        found.append(
            Finding(
                "QAT038",
                "warning",
                f"On validation item {worst.index} {sides} differ far more than on others: look at it, and calibrate on"
                " data that has its like",
                evidence={
                    "index": worst.index,
                    "sqnr_db": worst.sqnr_db,
                    "times_median": cases.times_median(worst),
                    "share_of_error": worst.share,
                    "images": cases.samples,
                },
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return found
