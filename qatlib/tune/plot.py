"""The search as a picture: metric and distance from float over latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qatlib.atomic import atomic_path
from qatlib.tune.result import Attempt, Result

PREDICTED, MEASURED, BEST = "#8a8f98", "#1f6feb", "#d1242f"


def draw(result: Result, paths: Sequence[Path]) -> None:
    """Write the picture in the format of each path's suffix; equal results give equal files."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "qatlib", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        _metric(left, result)
        _distance(right, result)
        for axes in (left, right):
            axes.set_xlabel(f"latency on {result.target}, µs (estimate)")
            axes.grid(color="#d8dee4", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(frameon=False, loc="lower right")
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:], dpi=120, metadata=metadata)


def _metric(axes: Any, result: Result) -> None:
    axes.set_ylabel(result.metric)
    if result.float_metric is not None:
        axes.axhline(result.float_metric, color=PREDICTED, linewidth=1, linestyle=":", label="float")
    front = result.pareto
    if front:
        axes.step(*_points(front), where="post", color=MEASURED, linewidth=1.2)
    axes.scatter(*_points(result.measured), color=MEASURED, s=22, zorder=3, label="measured")
    _marked(axes, result, lambda attempt: attempt.score.metric)


def _distance(axes: Any, result: Result) -> None:
    axes.set_ylabel("SQNR of the outputs against float, dB")
    predicted = [(p.latency_us, p.sqnr_db) for a in result.attempts if (p := a.predicted) and math.isfinite(p.sqnr_db)]
    if predicted:
        axes.plot(*zip(*predicted, strict=True), color=PREDICTED, marker="o", fillstyle="none", linewidth=1,
                  markersize=4, label="predicted")  # fmt: skip
    seen = [(a.cost.latency_us, -10 * math.log10(a.score.noise)) for a in result.measured
            if a.cost and a.score and a.score.noise > 0]  # fmt: skip
    if seen:
        axes.scatter(*zip(*seen, strict=True), color=MEASURED, s=22, zorder=3, label="measured")
    _marked(axes, result, lambda attempt: -10 * math.log10(attempt.score.noise) if attempt.score.noise else math.nan)


def _marked(axes: Any, result: Result, height: Any) -> None:
    for attempt, title, marker, color in (
        (result.present, "as it ships", "s", "black"),
        (result.best, "best", "*", BEST),
    ):
        if attempt is not None and attempt.cost is not None and attempt.score is not None:
            axes.scatter([attempt.cost.latency_us], [height(attempt)], marker=marker, s=90, facecolors="none",
                         edgecolors=color, zorder=4, label=title)  # fmt: skip


def _points(attempts: Sequence[Attempt]) -> tuple[list[float], list[float]]:
    found = [(a.cost.latency_us or 0.0, a.score.metric) for a in attempts if a.cost and a.score]
    return [x for x, _ in found], [y for _, y in found]
