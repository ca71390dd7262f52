"""Edits of findings that were tried between two runs: what was predicted of each, and what came of all together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qatlib.analysis.apply import edited
from qatlib.analysis.findings import Finding
from qatlib.analysis.goals import look_up
from qatlib.analysis.revision import Revision
from qatlib.errors import ConfigError
from qatlib.pipeline.config import yaml_values
from qatlib.pipeline.why import flat

SCORED_LAST = ("integer", "qat", "calib")
"""The stage whose metric an edit is judged by: the first of these that both runs have."""


def tried(base: Revision, head: Revision) -> list[Finding]:
    """Findings of ``base``, ignored ones too, whose edit the parameters of ``head`` hold and its own do not."""
    findings = [*base.found.findings, *(one.finding for one in base.found.ignored)]
    return [finding for finding in findings if _holds(finding, head.params) and not _holds(finding, base.params)]


def trials(base: Revision, head: Revision, comparable: bool = True) -> dict[str, Any]:
    """``rows``, a finding each with what was ``predicted``, empty where nothing was; and what was ``measured``.

    That is of all edits together, and of the parameters ``beside`` them that changed, too. It is empty if the reports
    of ``head`` are not ``comparable``.
    """
    findings = tried(base, head)
    with_edits = base.params
    for finding in findings:
        with suppress(ConfigError):
            with_edits = edited(finding, with_edits)
    return {
        "rows": [
            {
                "code": finding.code,
                "module": finding.module,
                "title": finding.title,
                "edit": finding.edit,
                "predicted": dict(finding.predicted),
            }
            for finding in findings
        ],
        "measured": measured_change(base, head) if comparable else {},
        "beside": sorted(changed_keys(with_edits, head.params)),
    }


def changed_keys(base: str, head: str) -> dict[str, tuple[Any, Any]]:
    """Dotted keys of two params.yaml whose values differ, with both; None for a key that is not there."""
    before, after = (flat(yaml_values(text)) for text in (base, head))
    pairs = {key: (before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys())}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _holds(finding: Finding, params: str) -> bool:
    """Whether the edit would change nothing; False for a cure that is no parameter."""
    try:
        return bool(yaml_values(edited(finding, params)) == yaml_values(params))
    except ConfigError:
        return False


def measured_change(base: Revision, head: Revision) -> dict[str, Any]:
    """``stage``, and by how much each quantity of :data:`PREDICTABLE` changed that both runs have."""
    found: dict[str, Any] = {}
    for stage in SCORED_LAST:
        before, after = (_score(revision, stage) for revision in (base, head))
        if before is not None and after is not None and base.summary["metric"] == head.summary["metric"]:
            found |= {"stage": stage, "metric": after - before}
            break
    for quantity, value in (("output_sqnr_db", output_sqnr), ("conversion_sqnr_db", conversion_sqnr)):
        (how, before), (also, after) = value(base.analysis), value(head.analysis)
        if how == also and before is not None and after is not None:
            found[quantity] = after - before
    return found


def _score(revision: Revision, stage: str) -> float | None:
    fresh = stage not in revision.summary.get("stale", ())
    return look_up(revision.summary, f"{stage}.{revision.summary['metric']}") if fresh else None


def output_sqnr(analysis: Mapping[str, Any] | None) -> tuple[str, float | None]:
    """Of the outputs against float, in dB, and how it was measured: in a study, else by the last op of the capture."""
    study = (analysis or {}).get("study")
    if study is not None:
        return "study", study["sensitivity"]["whole"]["sqnr_db"]
    return "FvsQ", _last(analysis, "FvsQ")


def conversion_sqnr(analysis: Mapping[str, Any] | None) -> tuple[str, float | None]:
    """Of the Program's outputs against fake-quant, in dB, and how it was measured."""
    study = (analysis or {}).get("study")
    if study is not None and "conversion" in study:
        return "study", study["conversion"]["whole"]["sqnr_db"]
    return "QvsQ", _last(analysis, "QvsQ")


def _last(analysis: Mapping[str, Any] | None, mode: str) -> float | None:
    seen = [op["accumulated"] for op in (analysis or {}).get("ops", ()) if op["mode"] == mode and op["accumulated"]]
    return seen[-1]["sqnr_db"] if seen else None
