"""What a compiled Program does on its accelerator, from the content of ``performance.json``: figures as inline SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from qatlib.analysis.report.tables import digits

Performance = Mapping[str, Any]

WIDTH, LEFT, RIGHT, TOP = 960, 70, 20, 14
ROOF_HEIGHT, ROOF_BOTTOM = 340, 42
ROW, GAP, AXIS = 26, 8, 34
LABELED = 4
"""Ops named in the roofline: those of the largest share of the latency."""
LETTER, LINE = 6.6, 14
BOUNDS = {
    "mac": "array",
    "vector": "vector unit",
    "table": "table unit",
    "weights": "weights",
    "sram": "SRAM",
    "dram": "DRAM",
    "launch": "start of an op",
}
CAUSES = {
    "compute": "another unit",
    "sram": "SRAM",
    "dram": "DRAM",
    "weights": "weights",
    "table": "a table",
    "dependency": "another op",
    "launch": "start of an op",
}
UNITS = {
    "array": "MAC array",
    "vector": "vector unit",
    "table": "table unit",
    "resize": "resize unit",
    "warp": "warp unit",
    "dma": "copies of weights",
    "sram": "SRAM bus",
    "dram": "DRAM bus",
}


@dataclass(frozen=True)
class Accelerator:
    """The parts of the section above its table: (words, value) pairs, figures, and rows of what the units do.

    A row has a unit that works, the share of the time that it does, and the shares that it waits by ``causes``.
    """

    facts: Sequence[tuple[str, str]]
    roofline: Markup
    timeline: Markup
    bounds: Sequence[tuple[str, str]]
    causes: Sequence[str]
    units: Sequence[tuple[str, float, Sequence[float]]]


def accelerator(performance: Performance) -> Accelerator:
    cycles = performance["cycles"] or 1
    used = {op["bound"] for op in performance["ops"]}
    tables = any(row["unit"] == "table" for row in performance["units"])
    causes = {cause: words for cause, words in CAUSES.items() if cause != "table" or tables}
    return Accelerator(
        facts=_facts(performance),
        roofline=roofline(performance),
        timeline=timeline(performance),
        bounds=[(f"b-{bound}", words) for bound, words in BOUNDS.items() if bound in used],
        causes=list(causes.values()),
        units=[
            (UNITS[row["unit"]], row["busy"] / cycles, [row[cause] / cycles for cause in causes])
            for row in performance["units"]
            if row["busy"]
        ],
    )


def _facts(performance: Performance) -> list[tuple[str, str]]:
    fps = performance["fps"]
    return [
        ("Latency", f"{digits(performance['latency_us'])} µs"),
        ("Inferences a second", "–" if fps is None else digits(fps)),
        ("MACs", quantity(performance["macs"], "")),
        ("Array use", f"{100 * performance['utilization']:.1f} %"),
        ("DRAM, an inference", quantity(performance["dram_bytes"], "B")),
        ("DRAM, a second", quantity(performance["dram_bytes_per_s"], "B/s")),
        (
            "SRAM, peak",
            f"{quantity(performance['sram_peak_bytes'], 'B')} of {quantity(performance['sram_size_bytes'], 'B')}",
        ),
        ("Weights and constants", quantity(performance["static_bytes"], "B")),
        ("Maps in DRAM", quantity(performance["dram_peak_bytes"], "B")),
    ]


def quantity(amount: float, unit: str) -> str:
    """Three digits with a decimal prefix."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= limit:
            return f"{amount / limit:.3g} {prefix}{unit}"
    return f"{amount:.3g} {unit}".strip()


# -- roofline ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dot:
    op: Mapping[str, Any]
    intensity: float
    rate: float

    @property
    def radius(self) -> float:
        return 3 + 14 * math.sqrt(float(self.op["share"]))


def roofline(performance: Performance) -> Markup:
    """MACs a second over MACs for a byte of DRAM traffic, for each op that has both, below what the target could do.

    The area of a dot is the op's share of the latency; empty if no op has both.
    """
    total = performance["latency_us"]
    dots = [
        _Dot(
            {**op, "share": op["latency_us"] / total},
            op["macs"] / op["dram_bytes"],
            op["macs"] / op["latency_us"] * 1e6,
        )
        for op in performance["ops"]
        if op["macs"] and op["dram_bytes"] and op["latency_us"]
    ]
    if not dots:
        return Markup("")
    peak = performance["peak_macs_per_cycle"] * performance["clock_hz"]
    band = performance["dram_bytes_per_cycle"] * performance["clock_hz"]
    x0, x1 = _decades([peak / band, *(dot.intensity for dot in dots)])
    y0, y1 = _decades([peak, *(dot.rate for dot in dots)])
    right, bottom = WIDTH - RIGHT, ROOF_HEIGHT - ROOF_BOTTOM

    def x(intensity: float) -> float:
        return LEFT + (right - LEFT) * (math.log10(intensity) - x0) / (x1 - x0)

    def y(rate: float) -> float:
        return bottom - (bottom - TOP) * (math.log10(rate) - y0) / (y1 - y0)

    low = max(10**x0, 10**y0 / band)
    roof = [(low, low * band), (peak / band, peak), (10**x1, peak)]
    path = " ".join(f"{x(i):.1f},{y(rate):.1f}" for i, rate in roof)
    parts = [
        *_log_axes((x0, x1), (y0, y1), x, y),
        f'<polyline class="roof" points="{path}"/>',
        f'<text x="{right - 4}" y="{y(peak) - 5:.1f}" text-anchor="end">{quantity(peak, "MAC/s")}, int8</text>',
        *(_dot(dot, x, y) for dot in sorted(dots, key=lambda dot: -dot.radius)),
        *_labels(dots, x, y),
    ]
    label = "Roofline: MACs a second over MACs for a byte of DRAM traffic, for each op"
    return _svg("roofline", ROOF_HEIGHT, label, parts)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values."""
    return math.floor(math.log10(min(values) * 0.8)), math.ceil(math.log10(max(values) * 1.25))


def _log_axes(
    xs: tuple[int, int], ys: tuple[int, int], x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, ROOF_HEIGHT - ROOF_BOTTOM
    for power in range(ys[0], ys[1] + 1):
        at = y(10.0**power)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{quantity(10.0**power, "")}</text>'
    for power in range(xs[0], xs[1] + 1):
        at = x(10.0**power)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{10.0**power:g}</text>'
    words = "MACs for a byte of DRAM traffic"
    yield f'<text x="{(LEFT + right) / 2}" y="{ROOF_HEIGHT - 6}" text-anchor="middle">{words}</text>'
    yield f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">MACs a second</text>'


def _dot(dot: _Dot, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    op = dot.op
    return Markup('<circle class="b-{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
        op["bound"],
        f"{x(dot.intensity):.1f}",
        f"{y(dot.rate):.1f}",
        f"{dot.radius:.1f}",
        f"{op['op']}: {quantity(dot.rate, 'MAC/s')}, {dot.intensity:.3g} MACs for a byte, {100 * op['share']:.1f} % of"
        f" the latency, limited by: {BOUNDS.get(op['bound'], op['bound'])}",
    )


_Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


def _labels(dots: Sequence[_Dot], x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[str]:
    """Names of the ops that take the most time, each beside its dot where it covers neither a dot nor a name."""
    taken = [_around(dot, x, y) for dot in dots]
    for dot in sorted(dots, key=lambda dot: -dot.op["share"])[:LABELED]:
        name = str(dot.op["op"])
        left, top, right, bottom = _around(dot, x, y)
        width, middle = LETTER * len(name), (left + right) / 2
        corners = [(right + 3, (top + bottom - LINE) / 2), (left - 3 - width, (top + bottom - LINE) / 2)]
        corners += [(middle - width / 2, top - LINE - 2), (middle - width / 2, bottom + 2)]
        for at, high in corners:
            box = at, high, at + width, high + LINE
            inside = at > LEFT and box[2] < WIDTH - RIGHT and high > TOP and box[3] < ROOF_HEIGHT - ROOF_BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                label = Markup('<text class="label" x="{}" y="{}">{}</text>')
                yield label.format(f"{at:.1f}", f"{high + LINE - 3:.1f}", name)
                break


def _around(dot: _Dot, x: Callable[[float], float], y: Callable[[float], float]) -> _Box:
    at, high = x(dot.intensity), y(dot.rate)
    return at - dot.radius, high - dot.radius, at + dot.radius, high + dot.radius


def _meet(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# -- time --------------------------------------------------------------------------------------------------------------


def timeline(performance: Performance) -> Markup:
    """Ops in time by what limits them, the share that each unit works in each interval, and the SRAM that is taken."""
    total = float(performance["latency_us"])
    if not performance["intervals"]:
        return Markup("")
    right = WIDTH - RIGHT
    names = [row["unit"] for row in performance["units"] if row["busy"]]
    rows = ["ops", *names, "SRAM taken"]
    height = TOP + len(rows) * (ROW + GAP) + AXIS
    bottom = height - AXIS

    def x(us: float) -> float:
        return LEFT + 50 + (right - LEFT - 50) * us / total

    parts = list(_ticks(total, x, bottom))
    for i, name in enumerate(rows):
        base = TOP + i * (ROW + GAP) + ROW
        title = UNITS.get(name, name)
        parts.append(f'<text x="{LEFT + 42}" y="{base - ROW / 2 + 4:.1f}" text-anchor="end">{title}</text>')
        parts.append(f'<line class="grid" x1="{x(0):.1f}" x2="{right}" y1="{base}" y2="{base}"/>')
        if name == "ops":
            parts += _op_bars([op for op in performance["ops"] if op["latency_us"]], x, base)
        elif name == "SRAM taken":
            steps = [(op["start_us"], op["sram_live_bytes"]) for op in performance["ops"] if op["latency_us"]]
            parts.append(_area(steps, total, performance["sram_size_bytes"], x, base, "taken"))
        else:
            shares = [(part["start_us"], part[name]) for part in performance["intervals"]]
            parts.append(_area(shares, total, 1.0, x, base, "works"))
    label = "What the units of the accelerator do over the time of one inference"
    return _svg("timeline", height, label, parts)


def _op_bars(ops: Sequence[Mapping[str, Any]], x: Callable[[float], float], base: float) -> Iterator[str]:
    """Two ops that start at once stand one above the other, half as high."""
    starts = Counter(op["start_us"] for op in ops)
    seen = set[float]()
    for op in ops:
        start = op["start_us"]
        height = ROW / starts[start]
        yield _op_bar(op, x, base - (0 if start in seen else ROW - height), height)
        seen.add(start)


def _op_bar(op: Mapping[str, Any], x: Callable[[float], float], base: float, high: float) -> str:
    start, end = x(op["start_us"]), x(op["start_us"] + op["latency_us"])
    return Markup('<rect class="b-{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
        op["bound"],
        f"{start:.2f}",
        f"{base - high:g}",
        f"{max(0.4, end - start - 0.6):.2f}",
        f"{high:g}",
        f"{op['op']}: {op['latency_us']:.4g} µs, limited by: {BOUNDS.get(op['bound'], op['bound'])}",
    )


def _area(
    steps: Sequence[tuple[float, float]], end: float, full: float, x: Callable[[float], float], base: float, kind: str
) -> str:
    """A filled step curve; ``full`` is the height of a row."""
    points = [f"{x(0):.2f},{base}"]
    for (at, amount), (after, _) in zip(steps, [*steps[1:], (end, 0)], strict=True):
        top = base - ROW * min(1.0, amount / full)
        points += [f"{x(at):.2f},{top:.2f}", f"{x(after):.2f},{top:.2f}"]
    return f'<polygon class="{kind}" points="{" ".join([*points, f"{x(end):.2f},{base}"])}"/>'


def _ticks(total: float, x: Callable[[float], float], bottom: float) -> Iterator[str]:
    step = 10.0 ** math.floor(math.log10(total))
    step = next(s for s in (step / 5, step / 2, step, step * 2) if total / s <= 10)
    for i in range(int(total / step) + 1):
        at = x(i * step)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{i * step:,.6g}</text>'
    yield f'<text x="{(x(0) + x(total)) / 2:.1f}" y="{bottom + AXIS - 4}" text-anchor="middle">µs, estimated</text>'


def _svg(kind: str, height: float, label: str, parts: Sequence[str]) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg class="depth {kind}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{body}</svg>'
    )
