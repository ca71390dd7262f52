"""Whether QAT improved on calibration."""

from __future__ import annotations

from qatlib.analysis.edits import set_values
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule

LOSS = 0.002
"""Relative loss against calibration that is more than the noise of a small validation set."""


@rule("QAT016", guide="G8, G10, G12")
def qat_below_calibration(facts: Facts) -> list[Finding]:
    ratio = facts.ratio("qat", base="calib")
    if ratio is None or ratio >= 1.0 - LOSS:
        return []
    edit = set_values({"qat.lr": 1e-4, "qat.averaging_constant": 0.0})
    return [
        Finding(
            "QAT016",
            "warning",
            "QAT scores below the calibrated model it started from: lower the learning rate and freeze the scales",
            evidence={"calib": facts.value("calib") or 0.0, "qat": facts.value("qat") or 0.0, "ratio": ratio},
            edit=edit.yaml,
            command=edit.command,
        )
    ]
