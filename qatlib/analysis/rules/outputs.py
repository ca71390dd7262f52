"""Outputs of the network that are rounded: to a format where the accumulator could be whole, or to only 8 bits."""

from __future__ import annotations

from qatlib.analysis.edits import high_precision_outputs, override
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule

DENSE = ("conv", "conv_transpose", "linear")
TRUTH = ("compare", "logical")
"""Kinds that make truth values, for which 8 bits are more than enough."""


@rule("QAT007", guide="G30")
def output_not_high_precision(facts: Facts) -> list[Finding]:
    edit = high_precision_outputs()
    return [
        Finding(
            "QAT007",
            "warning",
            f"Output of the network is rounded to {op.dtype}: keep the int32 accumulator (high precision)",
            module=op.title,
            evidence={"dtype": op.dtype, "scale": op.scale or 0.0},
            edit=edit.yaml,
            command=edit.command,
        )
        for op in facts.ops
        if op.is_output and op.kind in DENSE and op.dtype in ("int8", "int16")
    ]


@rule("QAT024", guide="G32")
def output_is_int8(facts: Facts) -> list[Finding]:
    """Outputs that no accumulator can show: they need a format, and 16 bits cost little at the end of the network."""
    ops = {op.name: op for op in facts.ops}
    makers = {facts.maker(op.name): op for op in facts.ops if op.is_output and op.dtype == "int8"}
    findings = []
    for name, op in makers.items():
        maker = ops.get(name)
        if maker is None or maker.kind in (*DENSE, *TRUTH, "float_op"):
            continue
        edit = override(maker.where, facts.overrides, activation="int16")
        findings.append(
            Finding(
                "QAT024",
                "info",
                f"Output of the network is int8, made by {maker.kind}, which has no accumulator to show: give it int16",
                module=maker.title,
                evidence={"output": op.name, "dtype": op.dtype, "scale": maker.scale or 0.0},
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings
