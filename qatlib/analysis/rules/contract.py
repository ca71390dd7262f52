"""Fake-quant against integer on the same input: the contract of docs/numerics.md, section 5."""

from __future__ import annotations

import math

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.op_facts import TableFact
from qatlib.analysis.records import OpRecord
from qatlib.analysis.rules import rule
from qatlib.analysis.stats import Comparison

MOST_SHARE = 1e-3
"""Share of elements that may differ by one code."""
MOST_SHARE_INT16 = 2.0**-5
"""The same of 16-bit outputs: 2^(15 - b) with multipliers of b = 20 bits, whose rounding moves 256 times more codes."""
NOTABLE_SHARE = 1e-2
"""Share from which one code is more than a remark."""


def _breaks(record: OpRecord, seen: Comparison, table: TableFact | None) -> bool:
    """More than one code anywhere, or one on clearly more elements than rounding explains (three sigma of a count).

    A table of 16-bit codes may be off by its worst error, and the code of the function by another half, on any element.
    """
    if seen.differing is None or seen.above_1_lsb is None or seen.max_lsb is None:
        return False
    if table is not None and table.input_dtype == "int16":
        return round(seen.max_lsb) > table.worst_lsb + 0.5
    allowed = (MOST_SHARE_INT16 if record.qtype.dtype == "int16" else MOST_SHARE) * seen.count
    return seen.above_1_lsb > 0 or seen.differing > allowed + 3.0 * math.sqrt(allowed) + 1.0


@rule("QAT015", guide="G38, G41")
def op_breaks_contract(facts: Facts) -> list[Finding]:
    if facts.qvsq is None:
        return []
    exempt = {op.name for op in facts.ops if op.kind == "float_op"}
    tables = {op.name: op.table for op in facts.ops}
    return [
        _finding(record, seen)
        for record in facts.qvsq.records
        if record.name not in exempt and (seen := record.same_input) is not None
        if _breaks(record, seen, tables.get(record.name))
    ]


def _finding(record: OpRecord, seen: Comparison) -> Finding:
    match = record.match
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
