"""Whether QAT started well, ran well, and improved on calibration."""

from __future__ import annotations

from qatlib.analysis.edits import set_values
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule
from qatlib.fake.first_loss import FirstLoss
from qatlib.fake.guards import cures

LOSS = 0.002
"""Relative loss against calibration that is more than the noise of a small validation set."""
MAX_LOSS_RATIO = 5.0
"""A first loss this many times the float one is no longer what rounding costs."""


@rule("QAT016", guide="G8, G10, G12", symptom=True)
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


@rule("QAT028", guide="G11")
def training_went_back(facts: Facts) -> list[Finding]:
    rewinds = facts.value("qat", "nan_rewinds")
    if not rewinds:
        return []
    return [
        Finding(
            "QAT028",
            "warning",
            "QAT met values that are not finite and went back to earlier weights with half the learning rate",
            evidence={"nan_rewinds": int(rewinds), "learning_rate_factor": 0.5**rewinds},
            edit=cures(),
            command=set_values({"qat.warmup_steps": 100, "qat.clip_grad_norm": 1.0}).command,
        )
    ]


@rule("QAT029", guide="G12", symptom=True)
def first_loss_abnormal(facts: Facts) -> list[Finding]:
    seen = [facts.value("qat", f"first_loss{form}") for form in ("", "_calibrated", "_float")]
    if any(value is None for value in seen):
        return []
    first = FirstLoss(*(value or 0.0 for value in seen))
    if not first.abnormal(MAX_LOSS_RATIO):
        return []
    moving = not FirstLoss(first.calibrated, first.calibrated, first.in_float).abnormal(MAX_LOSS_RATIO)
    edit = set_values({"qat.averaging_constant": 0.0} if moving else {"calibrate.method": "mse"})
    return [
        Finding(
            "QAT029",
            "warning",
            "The first loss of QAT is far above the float model's: the activation scales moved too fast"
            if moving
            else "The first loss of QAT is far above the float model's: calibrate better before training",
            evidence={"float": first.in_float, "calibrated": first.calibrated, "fake_quant": first.fake_quant},
            edit=edit.yaml,
            command=edit.command,
            predicted={} if moving else facts.predicted_by("mse"),
        )
    ]


@rule("QAT030", guide="G10, G17")
def still_improving(facts: Facts) -> list[Finding]:
    best, epochs = facts.value("qat", "best_epoch"), facts.value("qat", "epochs")
    gain, score = facts.value("qat", "last_epoch_gain"), facts.value("qat")
    if not epochs or best != epochs or gain is None or not score or gain <= LOSS * abs(score):
        return []
    edit = set_values({"qat.epochs": 2 * int(epochs)})
    return [
        Finding(
            "QAT030",
            "info",
            "The last epoch is the best one and still gained: train longer",
            evidence={"best_epoch": int(best), "last_epoch_gain": gain},
            edit=edit.yaml,
            command=edit.command,
        )
    ]


@rule("QAT031", guide="G8, G10, G17", symptom=True)
def training_did_not_help(facts: Facts) -> list[Finding]:
    best, epochs = facts.value("qat", "best_epoch"), facts.value("qat", "epochs")
    if not epochs or best != 0:
        return []
    ratio, goal = facts.ratio("qat"), facts.goal_minimum("ratio.integer", 1.0)
    edit = set_values({"qat.lr": 1e-4, "qat.averaging_constant": 0.0})
    return [
        Finding(
            "QAT031",
            "info" if ratio is not None and ratio >= goal else "warning",
            "No epoch of QAT scored above the calibrated model in integers, so that one was kept",
            evidence={"epochs": int(epochs), "val_integer": facts.value("qat", "val_integer") or 0.0},
            edit=edit.yaml,
            command=edit.command,
        )
    ]
