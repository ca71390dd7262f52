"""``reports/analysis.json``: the facts behind ``reports/profiler.html``, for programs. ``docs/analysis.md`` has it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from qatlib.analysis.summary import DIGITS

if TYPE_CHECKING:
    from qatlib.analysis.distance import Distance
    from qatlib.analysis.facts import Facts
    from qatlib.analysis.findings import Found
    from qatlib.analysis.records import Capture, OpRecord
    from qatlib.analysis.stats import Comparison, Summary
    from qatlib.analysis.study import Study

SCHEMA_VERSION = 2
OPS = "ops"
"""Key of the long list, of which every item takes one line of the file."""
_SCALE_DIGITS = 9
"""Enough to tell any two float32 apart."""


def analysis_document(facts: Facts, found: Found) -> dict[str, Any]:
    """Plain data for JSON, the same for the same facts: 6 significant digits, of scales 9; null for what is not finite.

    Ops stand in forward order, one capture after the other; everything else in the order of its CSV file or page.
    """
    captures = [seen for seen in (facts.fvsq, facts.qvsq) if seen is not None]
    document: dict[str, Any] = _plain(
        {
            "schema_version": SCHEMA_VERSION,
            "metric": facts.metric,
            "higher_is_better": facts.higher_is_better,
            "captures": {seen.mode: _capture(seen) for seen in captures},
            OPS: [{"mode": seen.mode, **_op(record)} for seen in captures for record in seen.records],
            "inputs": facts.inputs,
            "unfused": facts.unfused,
            "study": None if facts.study is None else _study(facts.study),
            "findings": [{"code": f.code, "severity": f.severity, "module": f.module} for f in found.findings],
            "ignored": [{"code": i.finding.code, "module": i.finding.module} for i in found.ignored],
        }
    )
    return document


def _plain(value: Any, digits: int = DIGITS) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item, _SCALE_DIGITS if "scale" in key else digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, digits) for item in value]
    return value


def _capture(seen: Capture) -> dict[str, Any]:
    return {
        "batches": seen.batches,
        "samples": seen.samples,
        "unmeasured": seen.unmeasured,
        "saturations": seen.saturations,
    }


def _op(record: OpRecord) -> dict[str, Any]:
    return {
        "index": record.index,
        "name": record.name,
        "module": record.match,
        "call": record.call,
        "composite": record.composite,
        "type": record.type_name,
        "op": record.op,
        "inputs": record.inputs,
        "dtype": record.qtype.dtype,
        "scale": record.scale,
        "reference": _range(record.reference),
        "other": _range(record.other),
        "accumulated": _errors(record.accumulated),
        "same_input": _errors(record.same_input),
        "channels": _channels(record.channel_amax),
    }


def _channels(amax: Sequence[float]) -> dict[str, Any] | None:
    """How the largest magnitudes of an op's channels are spread."""
    if not amax:
        return None
    return {"count": len(amax), "dead": sum(m == 0.0 for m in amax), "median": median(amax), "largest": max(amax)}


def _range(seen: Summary | None) -> dict[str, Any] | None:
    return None if seen is None else {"min": seen.min, "max": seen.max, "mean": seen.mean, "std": math.sqrt(seen.var)}


def _errors(seen: Comparison | None) -> dict[str, Any] | None:
    """The key ``identical`` is there because an infinite SQNR is null."""
    if seen is None:
        return None
    return {
        "elements": seen.count,
        "identical": seen.se == 0.0,
        "cosine": seen.cosine,
        "mse": seen.mse,
        "l1": seen.l1,
        "kl": seen.kl,
        "sqnr_db": seen.sqnr_db,
        "max_abs": seen.max_abs,
        "max_lsb": seen.max_lsb,
        "differing": seen.differing,
        "above_1_lsb": seen.above_1_lsb,
        "saturated": seen.saturated,
    }


def _study(study: Study) -> dict[str, Any]:
    seen, steps, loss = study.sensitivity, study.steps, study.conversion
    document: dict[str, Any] = {
        "sensitivity": {
            "samples": seen.samples,
            "float_metric": seen.float_metric,
            "whole": _distance(seen.whole),
            "correlation": seen.correlation,
            "unmeasured": seen.unmeasured,
            "trials": [
                {
                    "module": t.unit.name,
                    "type": t.unit.type,
                    "kind": t.kind,
                    "part": t.part,
                    "share": t.share,
                    "score": seen.scores[t.unit.name],
                    **_distance(t.distance),
                }
                for t in seen.trials
            ],
        },
        "bad_cases": {
            mode: [
                {
                    "index": case.index,
                    "sqnr_db": case.sqnr_db,
                    "times_median": cases.times_median(case),
                    "share": case.share,
                }
                for case in cases.worst
            ]
            for mode, cases in study.bad_cases
        },
    }
    if steps is not None:
        document["steps"] = [
            {"module": s.unit.name, "type": s.unit.type, "first": _distance(s.first), "alone": _distance(s.alone)}
            for s in steps.steps
        ]
    if loss is not None:
        document["conversion"] = {
            "samples": loss.samples,
            "whole": _distance(loss.whole),
            "preserved": _distance(loss.preserved),
            "smallest": [unit.name for unit in loss.smallest],
            "trials": [
                {"module": t.unit.name, "type": t.unit.type, "share": t.share, **_distance(t.alone)}
                for t in loss.trials
            ],
        }
    return document


def _distance(seen: Distance) -> dict[str, Any]:
    return {"sqnr_db": seen.sqnr_db, "mse": seen.mse, "cosine": seen.cosine, "metric": seen.metric}
