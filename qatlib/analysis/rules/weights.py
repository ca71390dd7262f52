"""Weights of conv and linear, channel by channel: dead channels and outliers."""

from __future__ import annotations

from statistics import median

from qatlib.analysis.edits import override
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule

MOST_SPREAD = 32.0
"""Largest ratio of a channel's scale to the median of its layer."""
SHOWN = 8


@rule("QAT010", guide="G35")
def dead_channels(facts: Facts) -> list[Finding]:
    findings = []
    for op in facts.ops:
        if op.weight is None or not op.weight.dead:
            continue
        dead = op.weight.dead
        shown = ", ".join(map(str, dead[:SHOWN])) + (", …" if len(dead) > SHOWN else "")
        findings.append(
            Finding(
                "QAT010",
                "error" if len(dead) == op.weight.channels else "info",
                f"{len(dead)} of {op.weight.channels} output channels have only zero weights and cost time",
                module=op.title,
                evidence={"dead_channels": len(dead), "channels": op.weight.channels, "which": shown},
                edit="Prune these channels in the float model, or train it with a smaller weight decay",
                command="dvc repro --force --single-item float_check",
            )
        )
    return findings


@rule("QAT011", guide="G35")
def outlier_channels(facts: Facts) -> list[Finding]:
    """Only of int8 outputs: 16 bits, or an accumulator shown as it is, leave the other channels enough codes."""
    findings = []
    for op in facts.ops:
        scales = op.weight.live_scales if op.weight and op.dtype == "int8" else ()
        if len(scales) < 4 or max(scales) / median(scales) <= MOST_SPREAD:
            continue
        edit = override(op.where, facts.overrides, activation="int16")
        spread, everything = max(scales) / median(scales), op.weight.scales if op.weight and op.weight.scales else ()
        findings.append(
            Finding(
                "QAT011",
                "info",
                "One output channel has far larger weights than its layer: its activations set the range for all",
                module=op.title,
                evidence={"largest_over_median_scale": spread, "channel": everything.index(max(everything))},
                edit=edit.yaml,
                command=edit.command,
            )
        )
    return findings
