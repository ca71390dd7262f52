"""Whether the analysis data says anything about the model."""

from __future__ import annotations

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.graph.ir import CONSTANT
from qatlib.qtype import BOOL, INT32


@rule("QAT019", guide="G20")
def similarity_not_positive(facts: Facts) -> list[Finding]:
    if facts.fvsq is None:
        return []
    for record in facts.fvsq.records:
        seen = record.accumulated
        if seen is None or seen.cosine > 0.0 or record.op == CONSTANT or record.qtype in (BOOL, INT32):
            continue
        fault = "is zero everywhere" if seen.ref_sq == 0.0 or seen.other_sq == 0.0 else "points away from the float one"
        return [
            Finding(
                "QAT019",
                "warning",
                f"Output {fault} on the analysis data (cosine not above 0): use real input that reproduces the loss",
                module=record.title,
                evidence={"cosine": seen.cosine, "samples": facts.fvsq.samples},
                edit="analyze:\n  batches: 16",
                command="dvc exp run --temp -S analyze.batches=16",
            )
        ]
    return []
