"""Ops that the accelerator refuses."""

from __future__ import annotations

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule


@rule("QAT020", guide="G1")
def target_refuses_ops(facts: Facts) -> list[Finding]:
    refused = facts.value("compiled", "refused_ops")
    if not refused:
        return []
    return [
        Finding(
            "QAT020",
            "error",
            "The target refuses some ops, so the model was not compiled: see reports/compile_sim/refusals.json",
            evidence={"refused_ops": int(refused)},
            edit="compile:\n  target: qatlib/targets/bayes-like.yaml",
            command="dvc repro compile_sim",
        )
    ]
