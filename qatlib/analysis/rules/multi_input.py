"""cat, add and their like: inputs of unequal range share one output scale, in which the small one drowns."""

from __future__ import annotations

from collections.abc import Iterator

from qatlib.analysis.edits import override
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.graph.ir import CONSTANT
from qatlib.qtype import limits

KINDS = ("cat", "add", "sub", "maximum", "minimum")
MOST_RATIO = 8.0
"""Largest ratio of input ranges: beyond it the small input has fewer than 16 of 128 int8 steps."""


@rule("QAT009", guide="G37")
def unequal_input_ranges(facts: Facts) -> list[Finding]:
    findings = []
    for match, title, kind, ranges in _from_capture(facts) if facts.fvsq else _from_program(facts):
        live = [(name, amax) for name, amax in ranges if amax > 0.0]
        if len(live) < 2:
            continue
        (small, low), (large, high) = min(live, key=lambda r: r[1]), max(live, key=lambda r: r[1])
        if high / low < MOST_RATIO:
            continue
        edit = override(match, facts.overrides, activation="int16")
        findings.append(
            Finding(
                "QAT009",
                "warning" if kind == "cat" else "info",
                f"Inputs of {kind} have unequal ranges: bring them together, or give its output int16",
                module=title,
                evidence={"ratio": high / low, f"range of {small}": low, f"range of {large}": high},
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings


_Ranges = tuple[str, str, str, list[tuple[str, float]]]


def _from_capture(facts: Facts) -> Iterator[_Ranges]:
    assert facts.fvsq is not None
    for record in facts.fvsq.records:
        if record.op in KINDS and record.qtype.dtype == "int8":
            sources = [facts.fvsq.find(name) for name in record.inputs]
            computed = [s for s in sources if s is not None and s.op != CONSTANT]
            ranges = [(s.name, s.reference.amax) for s in computed if s.reference is not None]
            yield record.match, record.title, record.op, ranges


def _from_program(facts: Facts) -> Iterator[_Ranges]:
    dtypes = {op.name: op.dtype for op in facts.ops}
    constants = {op.name for op in facts.ops if op.kind == CONSTANT}
    for op in facts.ops:
        if op.kind in KINDS and op.dtype == "int8":
            pairs = ((n, s) for n, s in zip(op.inputs, op.input_scales, strict=True) if n not in constants)
            ranges = [(n, s * limits(dtypes.get(n, "int8"))[1]) for n, s in pairs if s is not None]
            yield op.where, op.title, op.kind, ranges
