"""Models of which little is quantized."""

from __future__ import annotations

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule

LEAST_SHARE = 0.9
"""Part of the multiply-accumulates below which an integer accelerator gains little."""
MOST = 5


@rule("QAT021", guide="G1")
def few_macs_are_quantized(facts: Facts) -> list[Finding]:
    seen = facts.coverage
    if seen is None or seen.share >= LEAST_SHARE:
        return []
    parts = (f"{name} ({seen.by_op[name] / seen.total:.1%})" for name in seen.float_ops[:MOST])
    return [
        Finding(
            "QAT021",
            "warning" if seen.quantized else "error",
            "Few of the multiply-accumulates are quantized: take the largest ops out of qat.hybrid",
            evidence={
                "quantized_share": seen.share,
                "macs": seen.total,
                "float_ops": ", ".join(parts),
                "float_op_count": len(seen.float_ops),
            },
            edit="qat:\n  hybrid: []",
            command='dvc exp run --temp -S "qat.hybrid=[]"',
        )
    ]
