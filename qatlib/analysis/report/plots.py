"""Error along depth, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from markupsafe import Markup

from qatlib.analysis.records import Capture, OpRecord
from qatlib.analysis.report.names import address
from qatlib.analysis.similarity import worst

WIDTH, HEIGHT = 960, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 14, 34
CEILING_DB = 120.0
"""SQNR at and above which outputs count as equal; float32 itself reaches about 140 dB."""
LABELED = 3
LETTER, LINE, GAP, NEAR = 6.6, 14, 5, 16
"""Of the names: mean width of a letter and height, their distance from what is drawn, and from their dot."""


def depth_plot(capture: Capture) -> Markup:
    """SQNR over the forward order: a line for the accumulated error, dots for the op alone; empty if nothing was
    measured.

    The worst ops are labeled. Each dot carries its op and value as a title, and leads to the op.
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

    parts = [
        *grid(low, high, y, "op, in forward order"),
        _line(accumulated, x, y),
        *_dots(same, x, y),
        *_labels(capture, accumulated, same, x, y),
    ]
    label = f"SQNR in dB of each op, {capture.mode}, in forward order"
    body = "".join(parts)
    return Markup(f'<svg class="depth" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>')


_Point = tuple[OpRecord, float]
_X = Callable[[OpRecord], float]
_Y = Callable[[float], float]


def grid(low: float, high: float, y: _Y, along: str) -> list[str]:
    """Lines and numbers of the dB axis, and the words below the other one."""
    step = 10 if high - low <= 60 else 20
    ticks = range(int(low), int(high) + 1, step)
    lines = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>' for t in ticks]
    names = [f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t}</text>' for t in ticks]
    axis = f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{along}</text>'
    return [*lines, *names, axis]


def _line(points: Sequence[_Point], x: _X, y: _Y) -> str:
    path = " ".join(f"{x(record):.1f},{y(db):.1f}" for record, db in points)
    return f'<polyline class="acc" points="{path}"/>'


def _dots(points: Sequence[_Point], x: _X, y: _Y) -> list[str]:
    return [
        Markup(
            '<a href="{}" tabindex="-1"><circle class="op" cx="{}" cy="{}" r="4"><title>{}: {}</title></circle></a>'
        ).format(
            address(record.name),
            f"{x(record):.1f}",
            f"{y(db):.1f}",
            record.title,
            f"{db:.1f} dB alone" if db < CEILING_DB else "equal",
        )
        for record, db in points
    ]


def _labels(capture: Capture, line: Sequence[_Point], dots: Sequence[_Point], x: _X, y: _Y) -> list[str]:
    """Names of the worst ops, each as near to its dot as it touches neither line nor dots nor another name."""
    inked = _inked([(x(record), y(db)) for record, db in line]) + [(x(record), y(db)) for record, db in dots]
    labels, taken = list[str](), list[_Box]()
    for record in worst(capture.records, LABELED):
        assert record.same_input is not None, "worst() leaves out what was not measured"
        if record.same_input.sqnr_db >= CEILING_DB:
            continue
        at = x(record), y(record.same_input.sqnr_db)
        free = [box for box in _boxes(at, len(record.title)) if not _covers(box, inked) and not _meets(box, taken)]
        if free:
            box = min(free, key=lambda box: _distance(box, at))
            taken.append(box)
            labels += _label(box, at, record.title)
    return labels


_Place = tuple[float, float]
_Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


def _inked(line: Sequence[_Place]) -> list[_Place]:
    """Places on a line so close to one another that no name fits between."""
    found = list(line[:1])
    for (x0, y0), (x1, y1) in pairwise(line):
        count = math.ceil(max(abs(x1 - x0), abs(y1 - y0)) / 4) or 1
        found += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(1, count + 1)]
    return found


def _boxes(at: _Place, letters: int) -> list[_Box]:
    """Where the name of a dot may be: beside it, above and below, within the picture."""
    width = LETTER * letters
    lefts = (at[0] + 8, at[0] - 8 - width, at[0] - width / 2)
    tops = range(TOP, HEIGHT - BOTTOM - LINE + 1, 2)
    return [(left, top, left + width, top + LINE) for left in lefts for top in tops
            if left >= LEFT and left + width <= WIDTH - RIGHT]  # fmt: skip


def _covers(box: _Box, places: Sequence[_Place]) -> bool:
    left, top, right, bottom = box
    return any(left - GAP < x < right + GAP and top - GAP < y < bottom + GAP for x, y in places)


def _meets(box: _Box, others: Sequence[_Box]) -> bool:
    return any(box[0] < o[2] + GAP and o[0] < box[2] + GAP and box[1] < o[3] and o[1] < box[3] for o in others)


def _distance(box: _Box, at: _Place) -> float:
    nearest = min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])
    return math.dist(nearest, at)


def _label(box: _Box, at: _Place, title: str) -> list[str]:
    """The name, with a thin line to its dot where that is not next to it."""
    left, top, right, bottom = box
    text = Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        f"{(left + right) / 2:.1f}", f"{bottom - 4:.1f}", title
    )
    if _distance(box, at) <= NEAR:
        return [text]
    x, y = min(max(at[0], left), right), min(max(at[1], top), bottom)
    return [f'<line class="leader" x1="{at[0]:.1f}" y1="{at[1]:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>', text]
