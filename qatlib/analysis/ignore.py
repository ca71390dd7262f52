"""Findings that ``analyze.ignore`` of params.yaml names: known, with a reason, and out of the ranking."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qatlib.analysis.findings import Finding, Found, Ignored
from qatlib.pipeline.config import Ignore
from qatlib.pipeline.match import Pattern


def set_aside(findings: Sequence[Finding], records: Sequence[Ignore]) -> Found:
    """``findings`` without those that a record names; the first such record gives the reason.

    A record that names none of them gets a note and is no error: findings come and go.
    """
    left, ignored = [], []
    for finding in findings:
        record = next((record for record in records if _names(record, finding)), None)
        if record is None:
            left.append(finding)
        else:
            ignored.append(Ignored(finding, record.reason))
    notes = (
        f"analyze.ignore[{index}] ({record.code}, match {record.match!r}) matches no finding: remove it, or correct it"
        for index, record in enumerate(records)
        if not any(_names(record, finding) for finding in findings)
    )
    return Found(tuple(left), tuple(ignored), tuple(notes))


def _names(record: Ignore, finding: Finding) -> bool:
    pattern = Pattern(record.match)
    return record.code == finding.code and any(pattern.covers(name) for name in _names_of(finding.module))


def _names_of(module: str) -> tuple[str, ...]:
    """The module of a finding as it is shown; of one call also the module, which means all calls, and that call."""
    call = re.fullmatch(r"(.*) \(call (\d+)\)", module)
    return (module, call[1], f"{call[1]}#{int(call[2]) - 1}") if call else (module,)
