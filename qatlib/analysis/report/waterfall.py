"""The first picture of the page: what each step of the pipeline took away or gave back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qatlib.analysis.facts import STAGE_TITLES


@dataclass(frozen=True)
class Step:
    """One stage. ``left`` and ``width`` are percent of the axis: the bar from the stage before to this one.

    ``change`` is the difference to the stage before, None for the first; ``worse`` tells whether it is a loss.
    """

    title: str
    value: float | None
    ratio: float | None
    images: int | None
    change: float | None
    worse: bool
    left: float
    width: float
    at: float
    stale: bool


@dataclass(frozen=True)
class Waterfall:
    metric: str
    low: float
    high: float
    steps: tuple[Step, ...]


def waterfall(summary: Mapping[str, Any]) -> Waterfall | None:
    """Steps of ``summary`` on an axis just wide enough for all values; None if no stage has one."""
    metric = str(summary["metric"])
    values = {stage: float(summary[stage][metric]) for stage in STAGE_TITLES if metric in summary.get(stage, {})}
    if not values:
        return None
    low, high = _axis(list(values.values()))
    steps, before = [], None
    for stage, title in STAGE_TITLES.items():
        if stage not in values and stage not in summary["missing"]:
            continue
        value = values.get(stage)
        steps.append(_step(summary, stage, title, value, before, low, high))
        before = value if value is not None else before
    return Waterfall(metric, low, high, tuple(steps))


def _axis(values: list[float]) -> tuple[float, float]:
    """Range around all values with a margin; at least 5 % of the largest, so that a tiny loss looks tiny."""
    low, high = min(values), max(values)
    half = 0.6 * max(high - low, 0.05 * abs(high), 1e-9)
    middle = (low + high) / 2
    return middle - half, middle + half


def _step(
    summary: Mapping[str, Any],
    stage: str,
    title: str,
    value: float | None,
    before: float | None,
    low: float,
    high: float,
) -> Step:
    def percent(x: float) -> float:
        return round(100.0 * (x - low) / (high - low), 3)

    change = None if value is None or before is None else value - before
    ends = sorted(percent(x) for x in (value, before) if x is not None) if value is not None else [0.0]
    ratio = 1.0 if stage == "float" and value is not None else summary["ratio"].get(stage)
    return Step(
        title=title,
        value=value,
        ratio=ratio,
        images=summary.get(stage, {}).get("images"),
        change=change,
        worse=change is not None and (change < 0) == bool(summary["higher_is_better"]) and change != 0,
        left=ends[0],
        width=round(ends[-1] - ends[0], 3),
        at=0.0 if value is None else percent(value),
        stale=stage in summary["stale"],
    )
