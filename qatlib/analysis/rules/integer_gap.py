"""Integer and compiled results that are not what the stage before them promised."""

from __future__ import annotations

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.analysis.similarity import worst

LOSS = 0.01
"""Relative loss from fake-quant to integer above which something is wrong; the contract allows rounding only."""


@rule("QAT004", guide="G14, G16, G41")
def integer_below_fake_quant(facts: Facts) -> list[Finding]:
    base = facts.fake_quant_stage
    ratio = facts.ratio("integer", base=base)
    if ratio is None or ratio >= 1.0 - LOSS:
        return []
    computed = [record for record in facts.qvsq.records if record.op != "quantize"] if facts.qvsq else []
    module = next((record.match for record in worst(computed, 1)), "")
    evidence = {base: facts.value(base) or 0.0, "integer": facts.value("integer") or 0.0, "ratio": ratio}
    return [
        Finding(
            "QAT004",
            "error",
            "The integer model scores far below the fake-quant model: compare their preprocessing, then the state in "
            "which fake-quant was scored, then op by op",
            module=module,
            evidence=evidence,
            edit=f"convert:\n  preserve: ['{module}']" if module else "Score both on the same data and preprocessing",
            command=f"dvc exp run --temp -S \"convert.preserve=['{module}']\""
            if module
            else "dvc repro --force convert",
        )
    ]


@rule("QAT017", guide="G1")
def compiled_differs_from_integer(facts: Facts) -> list[Finding]:
    integer, compiled = facts.value("integer"), facts.value("compiled")
    counts = facts.value("integer", "images"), facts.value("compiled", "images")
    if integer is None or compiled is None or integer == compiled or counts[0] is None or counts[0] != counts[1]:
        return []
    return [
        Finding(
            "QAT017",
            "error",
            "The compiled model scores differently from the Program on the same images; it must agree in every bit",
            evidence={"integer": integer, "compiled": compiled, "images": int(counts[0])},
            edit="No parameter cures this: compile the Program again, and report the target and Program if it stays",
            command="dvc repro --force --single-item compile_sim",
        )
    ]
