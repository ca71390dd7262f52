"""Accumulators that the weights could drive beyond 32 bits."""

from __future__ import annotations

from qatlib.analysis.edits import override
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.qtype import limits


@rule("QAT014", guide="G33")
def accumulator_may_saturate(facts: Facts) -> list[Finding]:
    _, largest = limits("int32")
    where = {op.name: op.where for op in facts.ops}
    findings = []
    for op in facts.ops:
        if op.acc_bound is None or op.acc_bound <= largest:
            continue
        edit = override(where.get(op.inputs[0], op.inputs[0]), facts.overrides, activation="int8")
        findings.append(
            Finding(
                "QAT014",
                "warning",
                "The int32 accumulator may saturate: give the input of this op fewer bits",
                module=op.where,
                evidence={"acc_bound": op.acc_bound, "limit": largest, "times_over": op.acc_bound / largest},
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings
