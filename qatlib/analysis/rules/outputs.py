"""Outputs of the network that are rounded to an activation format although the accumulator could leave it whole."""

from __future__ import annotations

from qatlib.analysis.edits import high_precision_outputs
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule


@rule("QAT007", guide="G30")
def output_not_high_precision(facts: Facts) -> list[Finding]:
    edit = high_precision_outputs()
    return [
        Finding(
            "QAT007",
            "warning",
            f"Output of the network is rounded to {op.dtype}: keep the int32 accumulator (high precision)",
            module=op.where,
            evidence={"dtype": op.dtype, "scale": op.scale or 0.0},
            edit=edit.yaml,
            command=edit.command,
        )
        for op in facts.ops
        if op.is_output and op.kind in ("conv", "linear") and op.dtype in ("int8", "int16")
    ]
