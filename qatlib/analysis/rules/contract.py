"""Fake-quant against integer on the same input: the contract of docs/numerics.md, section 5."""

from __future__ import annotations

import math

from qatlib.analysis.agreement import most_share
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.op_facts import OpFact
from qatlib.analysis.records import OpRecord
from qatlib.analysis.rules import rule
from qatlib.analysis.stats import Comparison

NOTABLE_SHARE = 1e-2
"""Share of 8-bit elements from which one code is more than a remark."""


def _breaks(record: OpRecord, seen: Comparison, op: OpFact | None) -> bool:
    """More than one code anywhere, or one on clearly more elements than rounding explains (three sigma of a count).

    A table of 16-bit codes may be off by its worst error, and the code of the function by another half, on any element.
    """
    table = op.table if op is not None else None
    if seen.differing is None or seen.above_1_lsb is None or seen.max_lsb is None:
        return False
    if table is not None and table.input_dtype == "int16":
        return round(seen.max_lsb) > table.worst_lsb + 0.5
    allowed = most_share(op.kind if op is not None else "", record.qtype.dtype) * seen.count
    return seen.above_1_lsb > 0 or seen.differing > allowed + 3.0 * math.sqrt(allowed) + 1.0


@rule("QAT015", guide="G38, G41")
def op_breaks_contract(facts: Facts) -> list[Finding]:
    if facts.qvsq is None:
        return []
    ops = {op.name: op for op in facts.ops}
    exempt = {op.name for op in facts.ops if op.kind == "float_op"}
    return [
        _finding(record, seen)
        for record in facts.qvsq.records
        if record.name not in exempt and (seen := record.same_input) is not None
        if _breaks(record, seen, ops.get(record.name))
    ]


def _finding(record: OpRecord, seen: Comparison) -> Finding:
    match = record.match
    # A 16-bit code is little, and where few input codes make it, 20 bits of a multiplier may turn many into exact ties.
    notable = record.qtype.dtype == "int8" and (seen.differing or 0) > NOTABLE_SHARE * seen.count
    return Finding(
        "QAT015",
        "error" if seen.above_1_lsb else "warning" if notable else "info",
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
