"""Integer and compiled results that are not what the stage before them promised."""

from __future__ import annotations

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.analysis.similarity import worst

LOSS = 0.01
"""Relative loss from fake-quant to integer above which something is wrong; the contract allows rounding only."""
CHANCE_ITEMS = 3
"""Items whose result a code on the other side of a half may turn by chance; a loss of no more says nothing."""


@rule("QAT004", guide="G14, G16, G41", symptom=True)
def integer_below_fake_quant(facts: Facts) -> list[Finding]:
    base = facts.fake_quant_stage
    ratio = facts.ratio("integer", base=base)
    before, after, images = facts.value(base), facts.value("integer"), facts.value("integer", "images")
    if ratio is None or before is None or after is None or ratio >= 1.0 - LOSS:
        return []
    if images and abs(before - after) <= CHANCE_ITEMS / images * max(1.0, abs(before)) * (1 + 1e-9):
        return []
    computed = [record for record in facts.qvsq.records if record.op != "quantize"] if facts.qvsq else []
    module = next((record.match for record in worst(computed, 1)), "")
    evidence: dict[str, float | int | str] = {base: before, "integer": after, "ratio": ratio}
    if images:
        evidence["images"] = int(images)
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
