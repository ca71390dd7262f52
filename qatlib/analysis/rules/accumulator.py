"""Accumulators that the weights could drive beyond 32 bits, and those that the data did."""

from __future__ import annotations

from qatlib.analysis.edits import Edit, override
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.op_facts import OpFact
from qatlib.analysis.records import Saturation
from qatlib.analysis.rules import rule
from qatlib.qtype import limits

LIMIT = limits("int32")[1]


@rule("QAT014", guide="G33")
def accumulator_may_saturate(facts: Facts) -> list[Finding]:
    """Bounds beyond 32 bits that the data did not reach, or with no data to tell."""
    findings = []
    for op in facts.ops:
        if op.acc_bound is None or op.acc_bound <= LIMIT:
            continue
        seen = _seen(facts, op)
        if seen is not None and seen.saturated:
            continue
        edit = _edit(facts, op)
        evidence: dict[str, float | int | str] = {
            "acc_bound": op.acc_bound,
            "limit": LIMIT,
            "times_over": op.acc_bound / LIMIT,
        }
        findings.append(
            Finding(
                "QAT014",
                "warning" if seen is None else "info",
                "The int32 accumulator may saturate: give what it multiplies fewer bits",
                module=op.title,
                evidence=evidence if seen is None else evidence | {"largest_seen": seen.largest, "saturated": 0},
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings


@rule("QAT022", guide="G33")
def accumulator_saturates(facts: Facts) -> list[Finding]:
    findings = []
    for op in facts.ops:
        seen = _seen(facts, op)
        if seen is None or not seen.saturated:
            continue
        edit = _edit(facts, op)
        findings.append(
            Finding(
                "QAT022",
                "error",
                "The int32 accumulator saturates on the data, so sums are cut: give what it multiplies fewer bits",
                module=op.title,
                evidence={
                    "acc_bound": seen.bound,
                    "limit": LIMIT,
                    "largest_seen": seen.largest,
                    "saturated": seen.saturated,
                    "elements": seen.elements,
                },
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings


def _seen(facts: Facts, op: OpFact) -> Saturation | None:
    found = facts.qvsq.saturations if facts.qvsq else ()
    return next((seen for seen in found if seen.name == op.name), None)


def _edit(facts: Facts, op: OpFact) -> Edit:
    """int8 for weights of 16 bits, else for the first input that has more than 8 (the input, where that is unknown)."""
    if op.weight is not None and op.weight.dtype == "int16":
        return override(op.where, facts.overrides, weight="int8")
    dtypes = {other.name: other.dtype for other in facts.ops} | {f"{x.name}.quant": x.dtype for x in facts.inputs}
    wide = [name for name in op.inputs if dtypes.get(name, "int16") != "int8"]
    if not wide:
        return Edit("Sum over fewer elements: split the layer in the model; all of it is int8 already", "dvc repro")
    return facts.narrower(wide[0])
