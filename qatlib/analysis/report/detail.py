"""What the page tells of one op when it is opened: numbers as text, histograms as counts. One JSON block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from qatlib.analysis.findings import Finding
from qatlib.analysis.records import STAGES_OF, Capture, OpRecord
from qatlib.analysis.report.names import Ops, finding_anchors
from qatlib.analysis.report.tables import show
from qatlib.analysis.stats import Comparison, Summary

BINS = 64
"""Bins of a histogram in the page; the records have four times as many."""
ERRORS = (
    "SQNR dB", "Cosine", "Mean error", "Largest error", "Largest error LSB", "Codes differ", "By more than 1",
    "KL nats",
)  # fmt: skip


def detail_data(captures: Sequence[Capture], ops: Ops, findings: Sequence[Finding]) -> Markup:
    """JSON text for a script element: whatever a module is called, it does not end the element."""
    about = dict[str, list[int]]()
    for i, finding in enumerate(findings):
        for name in ops.find(finding.module):
            about.setdefault(name, []).append(i)
    readers = dict[str, list[str]]()
    calls = dict[str, list[str]]()
    for name, record in ops.first.items():
        for source in dict.fromkeys(record.inputs):
            readers.setdefault(source, []).append(name)
        if record.call and (not record.composite or ops.steps(record.composite)[-1] == name):
            calls.setdefault(record.module, []).append(name)
    document = {
        "errors": ERRORS,
        "stages": {capture.mode: STAGES_OF[capture.mode] for capture in captures},
        "findings": [
            {"at": at, "severity": finding.severity, "code": finding.code, "title": finding.title}
            for at, finding in zip(finding_anchors(findings), findings, strict=True)
        ],
        "ops": {
            name: {
                **_head(record),
                "inputs": record.inputs,
                "readers": readers.get(name, []),
                "calls": calls.get(record.module, []) if record.call else [],
                "steps": ops.steps(record.composite),
                "findings": about.get(name, []),
                "seen": _seen(captures, ops, name),
            }
            for name, record in ops.first.items()
        },
    }
    return script_json(document)


def script_json(document: Mapping[str, Any]) -> Markup:
    """Compact JSON in which no ``<``, ``>`` or ``&`` is left, so that HTML sees plain text."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _head(record: OpRecord) -> dict[str, Any]:
    return {
        "title": record.title,
        "module": record.module,
        "type": record.module_type if not record.composite else f"{record.op}, step of {record.module_type}",
        "format": record.qtype.format,
        "scale": show(record.scale, 6),
    }


def _seen(captures: Sequence[Capture], ops: Ops, name: str) -> dict[str, Any]:
    found = dict[str, Any]()
    for capture in captures:
        record = ops.records[capture.mode].get(name)
        if record is None:
            continue
        found[capture.mode] = {
            "own": _errors(record.accumulated),
            "same": _errors(record.same_input),
            "ranges": [_range(record.reference), _range(record.other)],
            "why": [f"{item.what}: {item.why}" for item in capture.unmeasured if item.name == name],
            "histogram": _histogram(record),
        }
    return found


def _errors(seen: Comparison | None) -> list[str] | None:
    """In the order of :data:`ERRORS`."""
    if seen is None:
        return None
    above = None if seen.above_1_lsb is None else seen.above_1_lsb / seen.count
    values = (seen.sqnr_db, seen.cosine, seen.l1, seen.max_abs, seen.max_lsb)
    shown = [show(None if value is None else float(value)) for value in values]
    return [*shown, _percent(seen.differing_share), _percent(above), show(seen.kl, 3)]


def _percent(share: float | None) -> str:
    return show(None) if share is None else f"{show(100.0 * share, 3)} %"


def _range(seen: Summary | None) -> list[str] | None:
    """Smallest, largest, mean and standard deviation."""
    return None if seen is None else [show(x) for x in (seen.min, seen.max, seen.mean, seen.var**0.5)]


def _histogram(record: OpRecord) -> dict[str, Any] | None:
    """Counts per bin, from the bin ``at`` on, which covers all the format's codes from ``low`` to ``high`` (real)."""
    seen, scale = record.accumulated, record.scale
    if seen is None or seen.histograms is None or scale is None or record.reference is None:
        return None
    qmin, qmax = record.qtype.limits
    return {
        "low": _short(scale * qmin),
        "high": _short(scale * qmax),
        "min": _short(record.reference.min),
        "max": _short(record.reference.max),
        "cut": _percent(seen.saturated / seen.count) if seen.saturated else "",
        "counts": [_sparse(merged(row)) for row in seen.histograms],
    }


def merged(counts: Sequence[int]) -> list[int]:
    """:data:`BINS` sums of neighbours."""
    size = len(counts) // BINS
    return [sum(counts[i : i + size]) for i in range(0, len(counts), size)]


def _sparse(counts: Sequence[int]) -> list[int]:
    """The first bin that has any, and the counts from there to the last that has."""
    full = [i for i, count in enumerate(counts) if count]
    return [full[0], *counts[full[0] : full[-1] + 1]] if full else [0]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
