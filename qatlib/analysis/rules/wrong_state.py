"""A calibrated model that was scored while its fake-quant was off."""

from __future__ import annotations

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule

FEW_IMAGES = 1000
"""Below this many images two models may well score alike by chance."""


@rule("QAT003", guide="G6, G16")
def scored_in_wrong_state(facts: Facts) -> list[Finding]:
    scores, images = (facts.value("float"), facts.value("calib")), facts.value("calib", "images")
    in_calibration = facts.state == "CALIBRATION"
    same = scores[0] is not None and scores[0] == scores[1] and (images is None or images >= FEW_IMAGES)
    if not in_calibration and not (same and facts.state != "VALIDATION"):
        return []
    evidence: dict[str, float | int | str] = {"state": facts.state or "unknown"}
    evidence.update({k: v for k, v in zip(("float", "calib"), scores, strict=True) if v is not None})
    return [
        Finding(
            "QAT003",
            "error" if in_calibration else "warning",
            "The calibrated model was scored in CALIBRATION state"
            if in_calibration
            else "The calibrated model scores as the float model to the last digit: fake-quant was probably off",
            evidence=evidence,
            edit="set_fake_quantize(model, FakeQuantState.VALIDATION) after model.eval(), before the score",
            command="dvc repro --force --single-item calibrate",
        )
    ]
