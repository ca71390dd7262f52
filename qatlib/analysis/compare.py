"""What changed between two runs: scores, latency, findings, parameters, ops, and what came of the edits tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qatlib.analysis.findings import Finding
from qatlib.analysis.goals import look_up
from qatlib.analysis.revision import Revision
from qatlib.analysis.scored import STAGES
from qatlib.analysis.targets import NUMBERS
from qatlib.analysis.trial import changed_keys, trials

ERRORS = ("same_input", "accumulated")


def compare(base: Revision, head: Revision, outdated: Sequence[str] = ()) -> dict[str, Any]:
    """Plain data for JSON, rows in a stable order; null where one of the two has no such number.

    ``outdated`` are stages that ``dvc repro`` would run for ``head``: its numbers are then those of other parameters,
    so that nothing counts as measured.
    """
    return {
        "base": base.name,
        "head": head.name,
        "outdated": list(outdated),
        "metric": head.summary["metric"],
        "base_metric": base.summary["metric"],
        "higher_is_better": head.summary["higher_is_better"],
        "metrics": _metrics(base.summary, head.summary),
        "latency_us": _pair(look_up(base.summary, "latency_us"), look_up(head.summary, "latency_us")),
        "targets": _targets(base.targets, head.targets),
        "goals": {"base": base.summary.get("goals"), "head": head.summary.get("goals")},
        "params": _params(base.params, head.params),
        "findings": _findings(base.found.findings, head.found.findings),
        "trials": trials(base, head, comparable=not outdated),
        "ops": None if base.analysis is None or head.analysis is None else _ops(base.analysis, head.analysis),
    }


def _pair(base: float | None, head: float | None) -> dict[str, float | None]:
    return {"base": base, "head": head, "change": None if base is None or head is None else head - base}


def _targets(base: Mapping[str, Any], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per target that one of them names besides ``compile.target``."""
    none = dict.fromkeys(NUMBERS)
    pairs = ((name, base.get(name, none), head.get(name, none)) for name in dict.fromkeys((*base, *head)))
    return [{"name": name} | {key: _pair(old[key], new[key]) for key in NUMBERS} for name, old, new in pairs]


def _metrics(base: Mapping[str, Any], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per stage that one of them scored; metrics of different names are not subtracted."""
    same = base["metric"] == head["metric"]
    rows = []
    for stage in STAGES:
        before, after = (look_up(summary, f"{stage}.{summary['metric']}") for summary in (base, head))
        if before is None and after is None:
            continue
        ratio = _pair(look_up(base, f"ratio.{stage}"), look_up(head, f"ratio.{stage}"))
        stale = {"base": stage in base.get("stale", ()), "head": stage in head.get("stale", ())}
        pair = _pair(before, after) if same else {"base": before, "head": after, "change": None}
        rows.append({"stage": stage, **pair, "ratio": ratio, "stale": stale})
    return rows


def _params(base: str, head: str) -> list[dict[str, Any]]:
    """Lists are compared whole. A missing key is null."""
    return [{"key": key, "base": old, "head": new} for key, (old, new) in changed_keys(base, head).items()]


def _findings(base: Iterable[Finding], head: Iterable[Finding]) -> dict[str, list[dict[str, str]]]:
    before, after = ({(f.code, f.module): f for f in findings} for findings in (base, head))

    def rows(found: Mapping[tuple[str, str], Finding], keep: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        kept = set(keep)
        return [
            {"code": f.code, "severity": f.severity, "module": f.module, "title": f.title}
            for key, f in found.items()
            if key in kept
        ]

    return {
        "new": rows(after, after.keys() - before.keys()),
        "gone": rows(before, before.keys() - after.keys()),
        "stayed": rows(after, after.keys() & before.keys()),
    }


def _ops(base: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """Ops whose format or error changed, the largest change of error power first, and those that one of them lacks.

    Two ops are the same if mode and name are.
    """
    before, after = ({(op["mode"], op["name"]): op for op in document["ops"]} for document in (base, head))
    rows = []
    for place, key in enumerate(after):
        if key not in before:
            continue
        old, new = before[key], after[key]
        row = {
            "mode": new["mode"],
            "module": new["module"],
            "call": new["call"],
            "type": new["type"],
            "dtype": {"base": old["dtype"], "head": new["dtype"]},
            **{f"{error}_sqnr_db": _pair(_sqnr(old[error]), _sqnr(new[error])) for error in ERRORS},
            "identical": {error: {"base": _identical(old[error]), "head": _identical(new[error])} for error in ERRORS},
        }
        moves = [abs(_noise(new[error]) - _noise(old[error])) for error in ERRORS]
        if any(moves) or old["dtype"] != new["dtype"]:
            rows.append((-moves[0], -moves[1], place, row))
    return {
        "changed": [row for *_, row in sorted(rows, key=lambda item: item[:3])],
        "new": [{"mode": key[0], "module": after[key]["module"]} for key in after if key not in before],
        "gone": [{"mode": key[0], "module": before[key]["module"]} for key in before if key not in after],
    }


def _identical(error: Mapping[str, Any] | None) -> bool:
    return error is not None and bool(error["identical"])


def _sqnr(error: Mapping[str, Any] | None) -> float | None:
    """Null for identical tensors, too: of those it is infinite."""
    found: float | None = None if error is None else error["sqnr_db"]
    return found


def _noise(error: Mapping[str, Any] | None) -> float:
    """Power of the error over that of the reference; 0 where there is none, or none known."""
    sqnr = _sqnr(error)
    return 0.0 if sqnr is None else 10.0 ** (-sqnr / 10.0)
