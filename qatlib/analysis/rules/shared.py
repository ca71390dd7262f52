"""Calls of one module whose ranges are far apart, and whether they share a scale."""

from __future__ import annotations

import math

import qatlib.ops  # noqa: F401 registers the operators
from qatlib.analysis.call_sites import APART, CallSite
from qatlib.analysis.edits import Edit, named
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding, Severity
from qatlib.analysis.rules import rule
from qatlib.analysis.rules.formats import fixed_by_user, rescale
from qatlib.fake.formats import FormatRow
from qatlib.ops.base import BY_NAME

MOST = 3
SHOWN = 4
"""Of a module with more calls, the widest and the narrowest are told."""


@rule("QAT025", guide="G22, G23")
def calls_disagree(facts: Facts) -> list[Finding]:
    """A warning where the calls share a fixed scale, else a remark: each has a scale of its own.

    Modules that are fused into one another are told once; those that pass on the format of their input are left out.
    """
    formats = {row.op: row for row in facts.formats}
    told: set[tuple[str, str]] = set()
    found: list[tuple[float, Finding]] = []
    modules: dict[str, list[CallSite]] = {}
    for site in facts.shared:
        if site.amax and not _passes_on(facts, site):
            modules.setdefault(site.module, []).append(site)
    for module, sites in modules.items():
        wide, narrow = max(sites, key=_amax), min(sites, key=_amax)
        ratio = _amax(wide) / _amax(narrow)
        if ratio < APART or (wide.op, narrow.op) in told:
            continue
        told.add((wide.op, narrow.op))
        fixed = [row for site in (wide, narrow) if (row := formats.get(site.op)) and fixed_by_user(row)]
        shared = fixed[1] if len(fixed) == 2 and fixed[0].scale == fixed[1].scale else None
        found.append((ratio, _finding(facts, module, sites, wide, narrow, shared)))
    return [finding for _, finding in sorted(found, key=lambda pair: (pair[1].severity != "warning", -pair[0]))[:MOST]]


def _amax(site: CallSite) -> float:
    return site.amax or 0.0


def _passes_on(facts: Facts, site: CallSite) -> bool:
    record = facts.fvsq.find(site.op) if facts.fvsq else None
    return record is not None and record.op in BY_NAME and BY_NAME[record.op].keeps_scale


def _finding(
    facts: Facts, module: str, sites: list[CallSite], wide: CallSite, narrow: CallSite, shared: FormatRow | None
) -> Finding:
    """``shared`` is the format of the narrowest call where the widest has the same fixed scale."""
    ratio = _amax(wide) / _amax(narrow)
    bits = math.log2(ratio)
    evidence: dict[str, float | int | str] = {"calls": wide.calls, "ratio": ratio, "bits": bits}
    for site in sites if len(sites) <= SHOWN else (wide, narrow):
        evidence[f"largest of call {site.call}"] = _amax(site)
        if site.scale is not None:
            evidence[f"scale of call {site.call}"] = site.scale
    if shared is None:
        edit = named("model.unshare", [module], facts.unshare)
        title = (
            f"Calls of one module differ {ratio:.3g}-fold in range: nothing is lost here, where each has a scale of its"
            f" own; a tool with one scale for all would lose {bits:.1f} bits"
        )
    else:
        edit = _edit(facts, module, narrow, shared)
        title = (
            f"Calls of one module share a fixed scale ({shared.output_rule}) and differ {ratio:.3g}-fold in range: call"
            f" {narrow.call} loses {bits:.1f} bits"
        )
    severity: Severity = "info" if shared is None else "warning"
    return Finding("QAT025", severity, title, module, evidence, edit.yaml, edit.command)


def _edit(facts: Facts, module: str, narrow: CallSite, shared: FormatRow) -> Edit:
    record = facts.fvsq.find(narrow.op) if facts.fvsq else None
    if record is None or not shared.output_rule.startswith("qconfig."):
        return Edit(f"Give each call of {module} a module of its own, with its own scale, in the model", "dvc repro")
    return rescale(facts, shared, record.match, _amax(narrow))
