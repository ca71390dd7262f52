"""Ranges of the model's inputs: symmetric quantization wants them centered on 0 and within [-1, 1]."""

from __future__ import annotations

from qatlib.analysis.edits import input_format
from qatlib.analysis.facts import Facts, InputFact
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule

SYMMETRY = 0.5
"""The smaller of -min and max must be at least this share of the larger one."""
UNIT = 1.0 + 1e-3
NORMALIZED_SCALE = 1.0 / 128.0
"""Fixed int8 scale of an input in [-1, 1]."""
SAME_SCALE = 0.05


def _evidence(seen: InputFact) -> dict[str, float | int | str]:
    found: dict[str, float | int | str] = {"min": seen.min, "max": seen.max, "mean": seen.mean, "dtype": seen.dtype}
    return found | ({"scale": seen.scale} if seen.scale is not None else {})


@rule("QAT005", guide="G26, G29")
def input_not_normalized(facts: Facts) -> list[Finding]:
    findings = []
    for seen in facts.inputs:
        largest, smallest = max(-seen.min, seen.max, 0.0), max(0.0, min(-seen.min, seen.max))
        lopsided, outside = smallest < SYMMETRY * largest, largest > UNIT
        if not (lopsided or outside) or largest == 0.0:
            continue
        fault = " and ".join(["not symmetric around 0"] * lopsided + ["not within [-1, 1]"] * outside)
        scale = float(f"{largest / (32768 if seen.dtype == 'int16' else 128):.6g}")
        edit = input_format(seen.name, facts.input_formats, scale=scale)
        findings.append(
            Finding(
                "QAT005",
                "warning",
                f"Input range is {fault}: normalize it in preprocessing (then fix the scale to 1/128), "
                "or fix its scale",
                module=seen.name,
                evidence=_evidence(seen),
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings


@rule("QAT006", guide="G27")
def normalized_input_without_fixed_scale(facts: Facts) -> list[Finding]:
    findings = []
    for seen in facts.inputs:
        largest = max(-seen.min, seen.max)
        fits = 0.9 <= largest <= UNIT and min(-seen.min, seen.max) >= SYMMETRY * largest
        if seen.dtype != "int8" or seen.scale is None or not fits:
            continue
        if abs(seen.scale / NORMALIZED_SCALE - 1.0) <= SAME_SCALE:
            continue
        edit = input_format(seen.name, facts.input_formats, scale=NORMALIZED_SCALE)
        findings.append(
            Finding(
                "QAT006",
                "info",
                "Input lies in [-1, 1] but its scale is far from 1/128: fix it, so that it does not depend on the data",
                module=seen.name,
                evidence=_evidence(seen),
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings
