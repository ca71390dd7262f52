"""Whether the goals of params.yaml are met by a summary. Fail-closed: what is missing, stale or not finite fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qatlib.pipeline.config import Goal


@dataclass(frozen=True)
class GoalResult:
    goal: Goal
    value: float | None
    met: bool

    @property
    def text(self) -> str:
        """The demand, for people."""
        bounds = [f">= {self.goal.min:g}"] if self.goal.min is not None else []
        bounds += [f"<= {self.goal.max:g}"] if self.goal.max is not None else []
        return f"{self.goal.metric} {' and '.join(bounds)}"


def look_up(document: Mapping[str, Any], key: str) -> float | None:
    """Number at the dotted ``key``, or None if there is none or it is not finite."""
    found: Any = document
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return float(found)


def judge(goals: Iterable[Goal], document: Mapping[str, Any], stale: Sequence[str] = ()) -> tuple[GoalResult, ...]:
    """Results in the order of ``goals``. A number of one of the ``stale`` stages fails whatever its value."""
    results = []
    for goal in goals:
        value = look_up(document, goal.metric)
        fresh = not set(goal.metric.split(".")) & set(stale)
        inside = (
            value is not None and (goal.min is None or value >= goal.min) and (goal.max is None or value <= goal.max)
        )
        results.append(GoalResult(goal, value, inside and fresh))
    return tuple(results)
