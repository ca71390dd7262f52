"""What is measured after every epoch, and which epochs are worth keeping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Metric on validation data of the fake-quant model, of its integers, and of its weights in float."""

    fake_quant: float
    integer: float
    in_float: float = math.nan


@dataclass(frozen=True)
class Epoch:
    """One line of the history; epoch 0 is the calibrated model. NaN stands for what was not measured."""

    epoch: int
    lr: float
    train_loss: float
    in_float: float
    fake_quant: float
    integer: float


def better(score: float, other: float, higher_is_better: bool) -> bool:
    """Whether ``score`` beats ``other``; NaN beats nothing and is beaten by every number."""
    if math.isnan(score) or math.isnan(other):
        return math.isnan(other) and not math.isnan(score)
    return score > other if higher_is_better else score < other


def worth_keeping(history: Sequence[dict[str, Any]], count: int, higher_is_better: bool) -> set[int]:
    """Epoch 0, and the ``count`` others whose integers score best; of equal ones the earlier."""
    scores = {row["epoch"]: row["integer"] for row in history[1:] if not math.isnan(row["integer"])}
    ranked = sorted(scores, key=lambda epoch: (-scores[epoch] if higher_is_better else scores[epoch], epoch))
    return {0, *ranked[:count]}
