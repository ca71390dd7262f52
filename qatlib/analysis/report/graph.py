"""The network as inline SVG: ops coloured by their error, calls of shared modules in red, composites as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qatlib.analysis.records import STAGES_OF, OpRecord
from qatlib.analysis.report.layout import HIGH, NODE, Layout, layout
from qatlib.analysis.report.names import Ops, address
from qatlib.analysis.report.plots import CEILING_DB
from qatlib.analysis.report.tables import fixed

LEVELS = (
    (10.0, "below 10 dB"),
    (20.0, "10 to 20"),
    (30.0, "20 to 30"),
    (40.0, "30 to 40"),
    (CEILING_DB, "40 and more"),
)
"""SQNR of an op alone below which it has a colour, the worst first; from the last on it is equal."""
EQUAL, UNKNOWN = "equal", "not measured"
LETTERS = 25
MARGIN = 16


@dataclass(frozen=True)
class GraphView:
    """``folded`` and ``unfolded`` are whole pictures; ``unfolded`` is empty where nothing is folded.

    ``legend`` pairs CSS classes and words, ``modes`` the captures to colour by and their words; ``shared`` tells
    whether an op is a call of a shared module.
    """

    folded: Markup
    unfolded: Markup
    legend: Sequence[tuple[str, str]]
    modes: Sequence[tuple[str, str]]
    shared: bool


def graph_view(ops: Ops) -> GraphView | None:
    """None where there is nothing to draw."""
    if not ops.first:
        return None
    groups = _groups(ops.first)
    folded = any(groups[name] != name for name in groups)
    legend = [*((f"l{i}", words) for i, (_, words) in enumerate(LEVELS)), ("equal", EQUAL), ("unknown", UNKNOWN)]
    return GraphView(
        folded=_draw(ops, groups),
        unfolded=_draw(ops, {name: name for name in groups}) if folded else Markup(""),
        legend=legend,
        modes=[(mode.lower(), " against ".join(STAGES_OF[mode])) for mode in ops.records],
        shared=any(record.call for record in ops.first.values()),
    )


def level(record: OpRecord | None) -> str:
    """CSS class of the colour of an op."""
    if record is None or record.same_input is None:
        return "unknown"
    return next((f"l{i}" for i, (db, _) in enumerate(LEVELS) if record.same_input.sqnr_db < db), "equal")


def _groups(records: Mapping[str, OpRecord]) -> dict[str, str]:
    """For each op the one that stands for it: of the steps of a composite, and constants that only they read, the last,
    by which the whole is judged.
    """
    last = {record.composite: name for name, record in records.items() if record.composite}
    readers = dict[str, set[str]]()
    for record in records.values():
        for source in record.inputs:
            readers.setdefault(source, set()).add(record.composite)
    groups = dict[str, str]()
    for name, record in records.items():
        whole = record.composite
        if record.op == "constant" and len(readers.get(name, ())) == 1:
            (whole,) = readers[name]
        groups[name] = last.get(whole, name)
    return groups


def _draw(ops: Ops, groups: Mapping[str, str]) -> Markup:
    inputs = dict[str, list[str]]()
    members = dict[str, list[str]]()
    for name in ops.first:
        members.setdefault(groups[name], []).append(name)
    for name in ops.first:
        if groups[name] != name:
            continue
        read = [source for member in members[name] for source in ops.first[member].inputs]
        for source in read:
            if source not in groups:
                inputs.setdefault(source, [])  # an input of the model
        inputs[name] = [whole for source in read if (whole := groups.get(source, source)) != name]
    placed = layout(inputs)
    parts = [_line(name, placed) for name in placed.lines]
    for name, place in placed.places.items():
        parts.append(_node(ops, name, members[name], place) if name in members else _input(name, place))
    size = f"{-MARGIN} {-MARGIN} {placed.width + 2 * MARGIN:.0f} {placed.height + 2 * MARGIN:.0f}"
    return Markup(
        '<svg class="graph" viewBox="{}" data-colour="{}" role="group" aria-label="Ops of the network">'
    ).format(size, next(iter(ops.records)).lower()) + Markup("{}</svg>").format(Markup("").join(parts))


def _line(name: str, placed: Layout) -> Markup:
    pieces = list[str]()
    for p in placed.lines[name]:
        middle = (p.y0 + p.y1) / 2
        straight = abs(p.x0 - p.x1) < 0.5
        pieces.append(f"M{p.x0:.0f} {p.y0:.0f}")
        pieces.append(
            f"V{p.y1:.0f}" if straight else f"C{p.x0:.0f} {middle:.0f} {p.x1:.0f} {middle:.0f} {p.x1:.0f} {p.y1:.0f}"
        )
        if p.through:
            pieces.append(f"v{HIGH}")
    return Markup('<path data-from="{}" d="{}"/>').format(name, "".join(pieces))


def _input(name: str, place: tuple[float, float]) -> Markup:
    x, y = place
    return Markup(
        '<g class="input"><rect x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="{}"/>'
        '<text x="{:.0f}" y="{:.0f}">input {}</text></g>'
    ).format(x - NODE / 2, y, NODE, HIGH, HIGH // 2, x, y + HIGH / 2 + 4, _short(name))


def _node(ops: Ops, name: str, members: Sequence[str], place: tuple[float, float]) -> Markup:
    record = ops.first[name]
    steps = [member for member in members if ops.first[member].composite]
    left, top = place[0] - NODE / 2, place[1]
    title = record.title if len(steps) < 2 else composite_title(record)
    kind = (record.type_name if len(steps) < 2 else record.module_type).rpartition(".")[2]
    words = [kind, f"{len(steps)} steps"] if len(steps) > 1 else [kind, record.qtype.format]
    colours = [
        Markup(' data-{}="{}"').format(mode.lower(), level(seen.get(name))) for mode, seen in ops.records.items()
    ]
    errors = [
        Markup('<tspan class="{}"> · {}</tspan>').format(mode.lower(), error_text(seen.get(name)))
        for mode, seen in ops.records.items()
    ]
    ring = Markup("")
    if record.call:
        ring = Markup('<rect class="ring" x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="7"/>').format(
            left - 4, top - 4, NODE + 8, HIGH + 8
        )
    return Markup(
        '<a href="{}" data-op="{}"{}{}><title>{}</title>{}<rect x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="4"/>'
        '<text x="{:.0f}" y="{:.0f}">{}</text><text class="kind" x="{:.0f}" y="{:.0f}">{}{}</text></a>'
    ).format(
        address(name),
        name,
        Markup(' data-steps="{}"').format(" ".join(steps)) if len(steps) > 1 else "",
        Markup("").join(colours),
        title,
        ring,
        left,
        top,
        NODE,
        HIGH,
        place[0],
        top + 16,
        _short(title),
        place[0],
        top + 31,
        " · ".join(words),
        Markup("").join(errors),
    )


def composite_title(record: OpRecord) -> str:
    """Name of the whole composite that a step belongs to."""
    return f"{record.module} (call {record.call})" if record.call else record.composite


def error_text(record: OpRecord | None) -> str:
    """SQNR of an op alone, in words."""
    if record is None or record.same_input is None:
        return UNKNOWN
    db = record.same_input.sqnr_db
    return f"{fixed(db, 1).text} dB" if db < CEILING_DB else EQUAL


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else "…" + name[1 - LETTERS :]
