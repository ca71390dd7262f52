"""Batch norms, adds and activations that could have been part of a convolution or linear and were not."""

from __future__ import annotations

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.analysis.unfused import KINDS


@rule("QAT026", guide="G24, G25")
def op_could_have_been_fused(facts: Facts) -> list[Finding]:
    """One finding a kind of op: the first that a change of the model would fuse, and how many more there are."""
    findings = []
    for kind in KINDS.values():
        found = [one for one in facts.unfused if one.kind == kind and one.fix]
        if not found:
            continue
        first = found[0]
        record = facts.fvsq.find(first.op) if facts.fvsq else None
        same = record.same_input if record is not None else None
        evidence: dict[str, float | int | str] = {
            "pattern": first.pattern,
            "reason": first.seen,
            "at": first.where,
            f"unfused_{kind.replace(' ', '_')}s": len(found),
        }
        findings.append(
            Finding(
                "QAT026",
                "warning" if kind == KINDS["batch_norm"] else "info",
                f"{first.type} stays an op of its own, with a rounding of its own: {first.seen}",
                module=first.op,
                evidence=evidence if same is None else evidence | {"op_sqnr_db": same.sqnr_db},
                edit=f"{first.fix} (in the model)",
                command="dvc repro",
            )
        )
    return findings
