"""Ops whose output format is too coarse for what they compute."""

from __future__ import annotations

import math
from collections.abc import Container

import qatlib.ops  # noqa: F401 registers the operators
from qatlib.analysis.edits import input_format, override
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.records import OpRecord
from qatlib.analysis.rules import rule
from qatlib.analysis.rules.channels import unlike_channels
from qatlib.ops.base import BY_NAME
from qatlib.qtype import BOOL

LEAST_SQNR_DB = 25.0
"""Same-input SQNR of an int8 op below which it loses accuracy; a bell-shaped int8 tensor has about 40 dB."""
FEW_CODES = 3.0
"""A standard deviation of fewer codes than this says that outliers, not the bulk, set the scale."""
MOST = 3


def _sqnr_db(record: OpRecord) -> float:
    seen = record.same_input
    return seen.sqnr_db if seen is not None and record.scale is not None and seen.ref_sq > 0 else math.inf


def _keeps_format(record: OpRecord) -> bool:
    operator = BY_NAME.get(record.op)
    return operator is not None and operator.keeps_scale


@rule("QAT008", guide="G33")
def op_needs_int16(facts: Facts) -> list[Finding]:
    """The first coarse op of each chain: what follows it inherits its rounding."""
    if facts.fvsq is None:
        return []
    coarse = {record.name: record for record in facts.fvsq.records if _sqnr_db(record) < LEAST_SQNR_DB}
    explained = _reading(facts, unlike_channels(facts))
    causes = [
        record
        for record in coarse.values()
        if record.qtype.dtype == "int8"
        and record.qtype != BOOL
        and not coarse.keys() & set(record.inputs)
        and record.name not in explained
        and not _keeps_format(record)
    ]
    return [_finding(record, facts) for record in sorted(causes, key=_sqnr_db)[:MOST]]


def _reading(facts: Facts, causes: Container[str]) -> set[str]:
    """``causes`` and what reads them, directly or through ops that only move, join or pool values."""
    found: set[str] = set()
    moved: set[str] = set()
    for record in facts.fvsq.records if facts.fvsq else ():
        if record.name in causes or any(name in causes or name in moved for name in record.inputs):
            found.add(record.name)
            if not record.channel_amax:
                moved.add(record.name)
    return found


def _finding(record: OpRecord, facts: Facts) -> Finding:
    same, seen = record.same_input, record.reference
    assert same is not None
    assert seen is not None
    assert record.scale is not None
    codes = math.sqrt(seen.var) / record.scale
    wide = "its range is too wide for int8 (outliers set the scale)" if codes < FEW_CODES else "int8 is too coarse"
    if record.op == "quantize":
        edit = input_format(record.inputs[0], facts.input_formats, activation="int16")
    else:
        edit = override(record.match, facts.overrides, activation="int16")
    return Finding(
        "QAT008",
        "warning",
        f"Large error with the same input: {wide}; give this output int16",
        module=record.title,
        evidence={
            "op_sqnr_db": same.sqnr_db,
            "op_error_lsb": same.max_lsb or 0.0,
            "min": seen.min,
            "max": seen.max,
            "std_in_codes": codes,
            "scale": record.scale,
        },
        edit=edit.yaml,
        command=edit.command,
    )
