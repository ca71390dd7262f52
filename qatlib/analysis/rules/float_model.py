"""Whether the float model is sound: quantization cannot repair what it does not do."""

from __future__ import annotations

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.rules import rule


@rule("QAT012", guide="G5")
def float_below_floor(facts: Facts) -> list[Finding]:
    value, floor = facts.value("float"), facts.floor
    if value is None or floor is None:
        return []
    if value >= floor if facts.higher_is_better else value <= floor:
        return []
    return [
        Finding(
            "QAT012",
            "error",
            "The float model misses its floor: were its weights really loaded, and did its training converge?",
            evidence={"float": value, "floor": floor},
            edit="Set model.checkpoint to the trained weights, or float_check.floor to what they are known to reach",
            command="dvc repro float_check",
        )
    ]


@rule("QAT013", guide="G5")
def float_overfit(facts: Facts) -> list[Finding]:
    gap = facts.value("float", "train_val_gap")
    train, value = facts.value("float", f"train_{facts.metric}"), facts.value("float")
    if gap is None and train is not None and value is not None:
        gap = train - value if facts.higher_is_better else value - train
    if gap is None or gap <= facts.max_train_val_gap:
        return []
    return [
        Finding(
            "QAT013",
            "warning",
            "The float model is overfit: the metric on training data is far better than on validation data",
            evidence={"train_val_gap": gap, "max_train_val_gap": facts.max_train_val_gap},
            edit="Train the float model with more data, augmentation or weight decay before quantizing it",
            command="dvc repro float_check",
        )
    ]


@rule("QAT018", guide="G7")
def image_counts_differ(facts: Facts) -> list[Finding]:
    counts = {stage: facts.value(stage, "images") for stage in ("float", "calib", "qat", "integer")}
    known = {stage: int(count) for stage, count in counts.items() if count is not None}
    if len(set(known.values())) < 2:
        return []
    return [
        Finding(
            "QAT018",
            "info",
            "Stages were scored on different numbers of images: their ratios compare unequal sets",
            evidence={f"{stage}_images": count for stage, count in known.items()},
            edit="Score every stage on the whole validation split",
            command="dvc repro",
        )
    ]
