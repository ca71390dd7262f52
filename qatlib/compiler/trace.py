"""A timeline as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: JSON of the Trace Event Format.

A track for each unit of the accelerator and one for the ops; counters for the SRAM that is taken and the bytes that
cross the DRAM's bus. Times are µs. An estimate, as the trace says itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatlib.atomic import write_json
from qatlib.compiler.perf import BASIS, Performance
from qatlib.compiler.spans import CAUSES

_PROCESS, _OPS = 1, 1
_INTERVALS = 500
"""For which the DRAM's counter gives means."""
_DIGITS = 6
"""Behind the comma of a µs."""


def write_trace(path: str | Path, performance: Performance) -> None:
    """Write the whole timeline; raises OutputError if it cannot be."""
    write_json(path, trace(performance), rows="traceEvents")


def trace(performance: Performance) -> dict[str, Any]:
    """The document, events of a track in the order of time."""
    about = {"target": performance.target, "source": performance.source, "basis": BASIS}
    events = [*_names(performance), *_ops(performance), *_spans(performance), *_counters(performance)]
    return {"displayTimeUnit": "ns", "otherData": about, "traceEvents": events}


def _names(performance: Performance) -> Iterator[dict[str, Any]]:
    def name(what: str, track: int, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": _PROCESS, "tid": track, "args": args}

    yield name("process_name", 0, name=f"{performance.target}, {BASIS}")
    for track, title in enumerate(("ops", *performance.timeline.units), _OPS):
        yield name("thread_name", track, name=title)
        yield name("thread_sort_index", track, sort_index=track)


def _event(performance: Performance, start: float, end: float) -> dict[str, Any]:
    """Time and length, rounded so that what follows one another does not overlap."""
    to_us = 1e6 / performance.clock_hz
    at = round(start * to_us, _DIGITS)
    return {"ph": "X", "pid": _PROCESS, "ts": at, "dur": round(max(0.0, round(end * to_us, _DIGITS) - at), _DIGITS)}


def _ops(performance: Performance) -> Iterator[dict[str, Any]]:
    rows = {row.op: row for row in performance.rows}
    for op in sorted(performance.timeline.ops, key=lambda op: (op.start, -op.end)):  # inside each other if at once
        row = rows[op.op]
        args: dict[str, Any] = {"module": row.module, "bound": row.bound, "macs": row.macs, "cycles": op.cycles}
        args |= {f"{op.main} waits for {cause}": round(op.stalls[op.main][cause]) for cause in CAUSES}
        yield _event(performance, op.start, op.end) | {"name": op.op, "cat": op.kind, "tid": _OPS, "args": args}


def _spans(performance: Performance) -> Iterator[dict[str, Any]]:
    timeline = performance.timeline
    tracks = {unit: track for track, unit in enumerate(timeline.units, _OPS + 1)}
    for unit, track in tracks.items():
        spans = [(span, op.op) for op in timeline.ops for span in op.spans if span.unit == unit]
        for span, name in sorted(spans, key=lambda pair: pair[0].start):  # two ops can run at once
            args: dict[str, Any] = {"busy cycles": round(span.busy, 3)}
            args |= {key: count for key in ("blocks", "bytes") if (count := round(getattr(span, key)))}
            event = _event(performance, span.start, span.end)
            yield event | {"name": name, "cat": span.what, "tid": track, "args": args}


def _counters(performance: Performance) -> Iterator[dict[str, Any]]:
    timeline, to_us = performance.timeline, 1e6 / performance.clock_hz

    def count(name: str, cycle: float, amount: int) -> dict[str, Any]:
        at = round(cycle * to_us, _DIGITS)
        return {"ph": "C", "name": name, "pid": _PROCESS, "ts": at, "args": {"bytes": amount}}

    for op in timeline.ops:
        yield count("SRAM bytes", op.start, op.sram_bytes)
    for i, rate in enumerate(timeline.bytes_per_s("dram", _INTERVALS) if timeline.ops else ()):
        yield count("DRAM bytes/s", i * timeline.cycles / _INTERVALS, round(float(rate)))
    if timeline.ops:
        yield count("SRAM bytes", timeline.cycles, 0)
        yield count("DRAM bytes/s", timeline.cycles, 0)
