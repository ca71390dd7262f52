"""The part of the page that shows a study: tables, bars of sensitivity, the curve of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from qatlib.analysis.conversion_loss import ConversionLoss
from qatlib.analysis.report.plots import BOTTOM, CEILING_DB, HEIGHT, LEFT, RIGHT, TOP, WIDTH, grid
from qatlib.analysis.report.tables import Cell, fixed, number
from qatlib.analysis.sensitivity import Kind, Part, Sensitivity
from qatlib.analysis.steps import Steps

SHOWN = 20
"""Bars, the largest shares first."""
ROW, NAMES = 18, 300

Columns = Sequence[tuple[str, str]]
Rows = list[tuple[Cell, ...]]


def sensitivity_table(seen: Sensitivity) -> tuple[Columns, Rows]:
    columns = (
        ("#", "Place in forward order"),
        ("Op", "Name in params.yaml"),
        ("Type", "Module or function"),
        ("On dB", "SQNR of the outputs with only this op rounded; higher is better"),
        ("On share", "Its error power over that with everything rounded"),
        ("Off share", "Part of the whole error power that goes where this op is float and all else rounded"),
        ("Weights off", "The same with only its weights in float"),
        ("Output off", "The same with only its output in float"),
        ("int16 output", "The same with its output in 16 bits"),
        ("int16 weights", "The same with its weights in 16 bits"),
        ("Score", "Noise that one gradient pass predicts for this op alone"),
    )
    parts: tuple[tuple[Kind, Part], ...] = (
        ("on", "all"),
        ("off", "all"),
        ("off", "weight"),
        ("off", "activation"),
        ("int16", "activation"),
        ("int16", "weight"),
    )
    rows = []
    for place, unit in enumerate(seen.units()):
        on = seen.find(unit.name, "on")
        found = [seen.find(unit.name, kind, part) for kind, part in parts]
        shares = (number(None if t is None else 100.0 * t.share, 3, " %") for t in found)
        score = number(seen.scores.get(unit.name), 3)
        rows.append(
            (*_name(place, unit.name, unit.type), fixed(on.distance.sqnr_db if on else None, 1), *shares, score)
        )
    return columns, rows


def step_table(seen: Steps) -> tuple[Columns, Rows]:
    columns = (
        ("k", "Ops rounded"),
        ("Op", "The last of them, by its name in params.yaml"),
        ("Type", "Module or function"),
        ("First k dB", "SQNR of the outputs with the first k ops rounded; higher is better"),
        ("Alone dB", "SQNR of the outputs with only this op rounded"),
    )
    rows = [
        (*_name(k, s.unit.name, s.unit.type), fixed(s.first.sqnr_db, 1), fixed(s.alone.sqnr_db, 1))
        for k, s in enumerate(seen.steps, 1)
    ]
    return columns, rows


def conversion_table(seen: ConversionLoss) -> tuple[Columns, Rows]:
    columns = (
        ("#", "Place in forward order"),
        ("Op", "Name in params.yaml"),
        ("Type", "Module or function"),
        ("SQNR dB", "Of the outputs, with only this op in integers; higher is better"),
        ("Share", "Its error power over that of the whole integer model"),
        ("Explains", "Whether it is one of the fewest ops that explain the loss"),
    )
    few = set(seen.smallest)
    rows = [
        (
            *_name(place, t.unit.name, t.unit.type),
            fixed(t.alone.sqnr_db, 1),
            number(100.0 * t.share, 3, " %"),
            Cell("yes" if t.unit in few else "", "a" if t.unit in few else "b"),
        )
        for place, t in enumerate(seen.trials)
    ]
    return columns, rows


def _name(place: int, name: str, kind: str) -> tuple[Cell, ...]:
    return Cell(str(place), place), Cell(name, name.lower()), Cell(kind, kind.lower())


def share_bars(seen: Sensitivity) -> Markup:
    """A bar for each of the :data:`SHOWN` largest shares, of "off" where it was measured, else of "on"."""
    trials = [t for t in seen.ranked("off") or seen.ranked("on") if math.isfinite(t.share) and t.share > 0][:SHOWN]
    if not trials:
        return Markup("")
    widest = max(1.0, *(t.share for t in trials))
    parts = []
    for i, trial in enumerate(trials):
        width = (WIDTH - NAMES - 70) * trial.share / widest
        parts.append(
            Markup(
                '<text x="{}" y="{}" text-anchor="end">{}</text>'
                '<rect class="loss" x="{}" y="{}" width="{}" height="11"/>'
                '<text x="{}" y="{}">{}</text>'
            ).format(
                NAMES - 8,
                ROW * i + 14,
                _short(trial.unit.name),
                NAMES,
                ROW * i + 5,
                f"{width:.1f}",
                f"{NAMES + width + 6:.1f}",
                ROW * i + 14,
                f"{trial.share:.0%}",
            )
        )
    label = "Share of the error at the output, by op"
    size = f"0 0 {WIDTH} {ROW * len(trials) + 6}"
    body = Markup("").join(parts)
    return Markup('<svg class="depth" viewBox="{}" role="img" aria-label="{}">{}</svg>').format(size, label, body)


def _short(name: str, most: int = 44) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def step_curve(seen: Steps) -> Markup:
    """SQNR of the outputs over the number of ops rounded: a line, and dots for each op alone."""
    first = [min(step.first.sqnr_db, CEILING_DB) for step in seen.steps]
    alone = [min(step.alone.sqnr_db, CEILING_DB) for step in seen.steps]
    finite = [db for db in (*first, *alone) if math.isfinite(db)]
    if not finite:
        return Markup("")
    low, high = 10.0 * math.floor(min(0.0, *finite) / 10.0), 10.0 * math.ceil(max(10.0, *finite) / 10.0)
    last = max(len(first) - 1, 1)

    def x(place: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * place / last

    def y(db: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - max(low, db)) / (high - low)

    dots = [
        Markup('<circle class="op" cx="{}" cy="{}" r="4"><title>{}: {}</title></circle>').format(
            f"{x(i):.1f}",
            f"{y(alone[i]):.1f}",
            s.unit.name,
            f"first {i + 1}: {first[i]:.1f} dB, alone {alone[i]:.1f} dB",
        )
        for i, s in enumerate(seen.steps)
    ]
    path = " ".join(f"{x(i):.1f},{y(db):.1f}" for i, db in enumerate(first))
    body = Markup("").join(
        [
            *map(Markup, grid(low, high, y, "ops rounded")),
            Markup('<polyline class="acc" points="{}"/>').format(path),
            *dots,
        ]
    )
    label = "SQNR in dB of the outputs with the first k ops rounded"
    return Markup('<svg class="depth" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, body
    )
