"""Formats that were asked for and cost accuracy: fixed scales, 16 bits that meet 8, 16-bit weights that keep few."""

from __future__ import annotations

from qatlib.analysis.edits import Edit, input_format, override
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.fake.formats import FormatRow
from qatlib.fake.prepare import BY_OPERATOR
from qatlib.graph.fuse import DENSE
from qatlib.qtype import limits

CLIPPED = 1.25
"""Values beyond the range of a fixed scale by this factor are no longer a few outliers of rounding."""
WASTED = 1 / 8
"""Below this share of the range, a fixed scale leaves 3 bits or more unused."""
SUMS = ("cat", "add", "sub", "maximum", "minimum", "where")
"""Kinds whose output holds no more bits than it is given: what their inputs have beyond it is lost."""
FEW_BITS = 10.0
"""Weights of 16 bits that use fewer than this cost twice the memory of 8 bits for little."""


@rule("QAT027", guide="G27")
def fixed_scale_does_not_fit(facts: Facts) -> list[Finding]:
    findings = []
    for row in facts.formats:
        record = facts.fvsq.find(row.op) if facts.fvsq and fixed_by_user(row) else None
        if record is None or record.reference is None or row.scale is None:
            continue
        largest, end = record.reference.amax, row.scale * limits(row.output)[1]
        if largest == 0.0 or WASTED <= largest / end <= CLIPPED:
            continue
        clips = largest > end
        edit = rescale(facts, row, record.match, largest)
        findings.append(
            Finding(
                "QAT027",
                "warning",
                f"Values lie far outside of the range of their fixed scale ({row.output_rule}) and are cut"
                if clips
                else f"A fixed scale ({row.output_rule}) leaves most of its codes unused",
                module=record.title,
                evidence={"scale": row.scale, "range_of_scale": end, "largest_seen": largest, "ratio": largest / end},
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings


def fixed_by_user(row: FormatRow) -> bool:
    """Whether the scale of an op is fixed, and not by the op itself."""
    return row.observer == "fixed" and row.output_rule != BY_OPERATOR


def rescale(facts: Facts, row: FormatRow, match: str, largest: float) -> Edit:
    """The edit that fixes the scale of the op named ``match`` to values up to ``largest``, by convention."""
    scale = float(f"{largest / -limits(row.output)[0]:.6g}")
    if row.output_rule.startswith("qconfig.inputs"):
        return input_format(row.op.removesuffix(".quant"), facts.input_formats, scale=scale)
    if row.output_rule.startswith("qconfig."):
        return override(match, facts.overrides, scale=scale)
    return Edit(f"Fix the scale of {row.op} to {scale:g} in the model ({row.output_rule})", "dvc repro")


def _match(facts: Facts, row: FormatRow) -> str:
    """The name that means the op in params.yaml."""
    record = facts.fvsq.find(row.op) if facts.fvsq else None
    return row.op if record is None else record.match


@rule("QAT034", guide="G32, G37")
def wide_format_meets_narrow(facts: Facts) -> list[Finding]:
    """16 bits that a sum or a concatenation rounds to 8: they were paid for, and are thrown away."""
    findings = []
    for row in facts.formats:
        inputs = row.inputs.split(", ")
        joined = inputs if row.kind in SUMS else inputs[1:] if row.kind in DENSE else []
        if row.output != "int8" or "int16" not in joined:
            continue
        edit = override(_match(facts, row), facts.overrides, activation="int16")
        findings.append(
            Finding(
                "QAT034",
                "warning",
                f"int16 is rounded to int8 where {row.kind} joins values: give its output int16, or its inputs int8",
                module=row.op,
                evidence={"inputs": row.inputs, "output": row.output, "rule": row.output_rule},
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings


@rule("QAT035", guide="G33, G35")
def wide_weights_keep_few_bits(facts: Facts) -> list[Finding]:
    findings = []
    for row in facts.formats:
        if row.weight != "int16" or row.weight_bits is None or row.weight_bits >= FEW_BITS:
            continue
        edit = override(_match(facts, row), facts.overrides, weight="int8")
        findings.append(
            Finding(
                "QAT035",
                "warning",
                f"int16 weights use {row.weight_bits:.1f} of their bits: the int32 accumulator has no room for more;"
                " int8 weights, or an int8 input, cost less",
                module=row.op,
                evidence={"weight_bits": row.weight_bits, "inputs": row.inputs, "rule": row.weight_rule},
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings
