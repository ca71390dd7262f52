"""Tables of steep functions, whose few entries leave errors that one sees."""

from __future__ import annotations

from qatlib.analysis.edits import Edit, table
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.op_facts import OpFact, TableFact
from qatlib.analysis.rules import rule
from qatlib.tables import DEFAULT_TABLE

MOST_LSB = 2.0
"""Worst error of a table, in output codes, that nobody needs to look at; one of 256 exact entries has 0.5."""
MOST_ENTRIES = 8192
"""Beyond it a table costs more memory than a second op that keeps the input gentle."""


@rule("QAT023", guide="G38, G39")
def steep_table(facts: Facts) -> list[Finding]:
    """Worst first."""
    found = [(op, op.table) for op in facts.ops if op.table is not None and op.table.worst_lsb > MOST_LSB]
    return [_finding(op, seen, facts) for op, seen in sorted(found, key=lambda pair: -pair[1].worst_lsb)]


def _finding(op: OpFact, seen: TableFact, facts: Facts) -> Finding:
    edit = _edit(op, seen, facts)
    return Finding(
        "QAT023",
        "warning",
        f"The table of {seen.function} is coarse where the function is steep: place more entries there, or keep its "
        "input out of that range",
        module=op.title,
        evidence={
            "function": seen.function,
            "worst_lsb": seen.worst_lsb,
            "mean_lsb": seen.mean_lsb,
            "division": seen.division,
            "segments": seen.segments,
            "entries": seen.entries,
        },
        edit=edit.yaml,
        command=edit.command,
    )


def _edit(op: OpFact, seen: TableFact, facts: Facts) -> Edit:
    """Segments that follow the curvature, four times the entries; beyond what is sensible, an input range by hand."""
    asked = max(DEFAULT_TABLE.entries, seen.entries - seen.segments)
    if asked >= MOST_ENTRIES:
        return Edit(
            f"Keep the input of {op.where} away from the steep part: clamp it in the model, or give "
            f"convert.tables a record with match '{op.where}' and a range",
            "dvc repro",
        )
    return table(op.where, facts.tables, division="curvature", segments=64, entries=min(MOST_ENTRIES, 4 * asked))
