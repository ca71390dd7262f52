"""Fake-quant against integer on the same input: the contract of docs/numerics.md, section 5."""

from __future__ import annotations

import math

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.records import OpRecord
from qatlib.analysis.rules import rule
from qatlib.analysis.stats import Comparison

MOST_SHARE = 1e-3
"""Share of elements that may differ by one code."""
NOTABLE_SHARE = 1e-2
"""Share from which one code is more than a remark."""


def _breaks(seen: Comparison) -> bool:
    """More than one code anywhere, or one code on clearly more than 0.1 % of elements (three sigma of a count)."""
    if seen.differing is None or seen.above_1_lsb is None:
        return False
    allowed = MOST_SHARE * seen.count
    return seen.above_1_lsb > 0 or seen.differing > allowed + 3.0 * math.sqrt(allowed) + 1.0


@rule("QAT015", guide="G38, G41")
def op_breaks_contract(facts: Facts) -> list[Finding]:
    if facts.qvsq is None:
        return []
    exempt = {op.name for op in facts.ops if op.kind == "float_op"}
    return [
        _finding(record, record.same_input)
        for record in facts.qvsq.records
        if record.name not in exempt and record.same_input is not None and _breaks(record.same_input)
    ]


def _finding(record: OpRecord, seen: Comparison) -> Finding:
    match = record.module or record.name
    return Finding(
        "QAT015",
        "error" if seen.above_1_lsb else "warning" if (seen.differing or 0) > NOTABLE_SHARE * seen.count else "info",
        "Integer and fake-quant differ more than rounding explains, given the same input",
        module=record.title,
        evidence={
            "op_error_lsb": seen.max_lsb or 0.0,
            "above_1_lsb": seen.above_1_lsb or 0,
            "differing": seen.differing or 0,
            "elements": seen.count,
        },
        edit=f"convert:\n  preserve: ['{match}']",
        command=f"dvc exp run --temp -S \"convert.preserve=['{match}']\"",
    )
