"""Error along depth, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from qatlib.analysis.records import Capture, OpRecord
from qatlib.analysis.similarity import worst

WIDTH, HEIGHT = 960, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 14, 34
CEILING_DB = 120.0
"""SQNR at and above which outputs count as equal; float32 itself reaches about 140 dB."""
LABELED = 3


def depth_plot(capture: Capture) -> Markup:
    """SQNR over the forward order: a line for the accumulated error, dots for the op alone; empty if nothing was
    measured.

    The worst ops are labeled. Each dot carries its op and value as a title.
    """
    accumulated = [(r, min(r.accumulated.sqnr_db, CEILING_DB)) for r in capture.records if r.accumulated]
    same = [(r, min(r.same_input.sqnr_db, CEILING_DB)) for r in capture.records if r.same_input]
    if not accumulated and not same:
        return Markup("")
    finite = [db for _, db in (*accumulated, *same) if math.isfinite(db)]
    low = 10.0 * math.floor(min([0.0, *finite]) / 10.0) if finite else 0.0
    high = 10.0 * math.ceil(max([10.0, *finite]) / 10.0) if finite else 10.0
    last = max(len(capture.records) - 1, 1)

    def x(record: OpRecord) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * record.index / last

    def y(db: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - max(low, db)) / (high - low)

    parts = [*_grid(low, high, y), _line(accumulated, x, y), *_dots(same, x, y), *_labels(capture, x, y)]
    label = f"SQNR in dB of each op, {capture.mode}, in forward order"
    body = "".join(parts)
    return Markup(f'<svg class="depth" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>')


_Point = tuple[OpRecord, float]
_X = Callable[[OpRecord], float]
_Y = Callable[[float], float]


def _grid(low: float, high: float, y: _Y) -> list[str]:
    step = 10 if high - low <= 60 else 20
    ticks = range(int(low), int(high) + 1, step)
    lines = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>' for t in ticks]
    names = [f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t}</text>' for t in ticks]
    axis = f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">op, in forward order</text>'
    return [*lines, *names, axis]


def _line(points: Sequence[_Point], x: _X, y: _Y) -> str:
    path = " ".join(f"{x(record):.1f},{y(db):.1f}" for record, db in points)
    return f'<polyline class="acc" points="{path}"/>'


def _dots(points: Sequence[_Point], x: _X, y: _Y) -> list[str]:
    return [
        Markup('<circle class="op" cx="{}" cy="{}" r="4"><title>{}: {}</title></circle>').format(
            f"{x(record):.1f}", f"{y(db):.1f}", record.title, f"{db:.1f} dB alone" if db < CEILING_DB else "equal"
        )
        for record, db in points
    ]


def _labels(capture: Capture, x: _X, y: _Y) -> list[str]:
    """Names of the worst ops, kept inside the picture and apart from one another."""
    labels, taken = list[str](), list[float]()
    for record in worst(capture.records, LABELED):
        assert record.same_input is not None, "worst() leaves out what was not measured"
        db = record.same_input.sqnr_db
        at = x(record)
        if db >= CEILING_DB or any(abs(at - other) < 150 for other in taken):
            continue
        taken.append(at)
        anchor = "start" if at < WIDTH / 2 else "end"
        shift = 8 if anchor == "start" else -8
        labels.append(
            Markup('<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                f"{at + shift:.1f}", f"{y(db) + 14:.1f}", anchor, record.title
            )
        )
    return labels
