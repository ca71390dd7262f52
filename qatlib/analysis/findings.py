"""A finding: what is wrong, where, the numbers that show it, the edit that cures it and the command that tries it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qatlib.errors import StageError

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
SEVERITY_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
"""For rich."""
FINDINGS = "reports/findings.json"
PREDICTABLE = {
    "metric": "metric",
    "output_sqnr_db": "output SQNR",
    "conversion_sqnr_db": "conversion SQNR",
}
"""What an edit may be predicted to change, by its name for people: the scored metric; the SQNR of the outputs, in dB,
against float and, of the Program, against fake-quant."""


@dataclass(frozen=True)
class Finding:
    """``edit`` is a YAML snippet for params.yaml (or a sentence, where the cure is not a parameter); ``command`` runs
    it.

    ``module`` is the name in the user's model, empty for the model as a whole. ``evidence`` maps a quantity, with its
    unit in the name, to its value. ``predicted`` is by how much the edit will change a quantity of
    :data:`PREDICTABLE`, as far as a measurement tells; empty where none does.
    """

    code: str
    severity: Severity
    title: str
    module: str = ""
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)
    edit: str = ""
    command: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict)

    @property
    def page(self) -> str:
        """Page that explains the rule, relative to the root of the project."""
        return f"docs/rules/{self.code}.md"

    def document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        document = {
            "code": self.code,
            "severity": self.severity,
            "title": self.title,
            "module": self.module,
            "evidence": dict(self.evidence),
            "edit": self.edit,
            "command": self.command,
            "page": self.page,
        }
        return {**document, "predicted": dict(self.predicted)} if self.predicted else document


@dataclass(frozen=True)
class Ignored:
    """A finding that ``analyze.ignore`` names, and why."""

    finding: Finding
    reason: str


@dataclass(frozen=True)
class Found:
    """``findings`` errors first; ``notes`` are on records of ``analyze.ignore`` that match nothing, and on what
    ``analyze.sensitivity`` could not measure.
    """

    findings: tuple[Finding, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Content of ``findings.json``."""
        return {
            "findings": [finding.document() for finding in self.findings],
            "ignored": [{**one.finding.document(), "reason": one.reason} for one in self.ignored],
            "notes": list(self.notes),
        }


def read_findings(path: str | Path = FINDINGS) -> Found:
    """What the analyze stage wrote; raises StageError QAT195 if there is no such file or it holds something else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise StageError("QAT195", str(path), f"cannot be read ({error!r})", "Run dvc repro first") from None
    return parse_findings(text, str(path))


def parse_findings(text: str, where: str = FINDINGS) -> Found:
    """The content of the file ``where``; raises StageError QAT195 if it is something else."""
    try:
        document = json.loads(text)
        ignored = tuple(Ignored(_finding(item), item["reason"]) for item in document["ignored"])
        return Found(tuple(map(_finding, document["findings"])), ignored, tuple(document["notes"]))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise StageError("QAT195", where, f"cannot be read ({error!r})", "Run dvc repro first") from None


def of_code(found: Found, code: str) -> Found:
    """Only the findings of ``code``."""
    ignored = (one for one in found.ignored if one.finding.code == code)
    return Found(tuple(finding for finding in found.findings if finding.code == code), tuple(ignored))


def _finding(document: Mapping[str, Any]) -> Finding:
    return Finding(**{key: value for key, value in document.items() if key not in ("page", "reason")})


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first; findings of one severity keep the order in which they were given."""
    return tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))


def finite(predicted: Mapping[str, float]) -> dict[str, float]:
    """Without what a measurement does not tell: an infinite SQNR is of noise that is gone whole."""
    return {quantity: value for quantity, value in predicted.items() if math.isfinite(value)}


def evidence_text(finding: Finding) -> str:
    """The numbers of a finding on one line."""
    shown = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in finding.evidence.items()
    )
    return ", ".join(shown)


def severity_counts(findings: Iterable[Finding]) -> dict[str, int]:
    """Number of ``errors``, ``warnings`` and ``info``, zeros included.

    The key is not ``error``: DVC takes a mapping with that key for a metric that failed to load.
    """
    counts = Counter(finding.severity for finding in findings)
    return {"errors": counts["error"], "warnings": counts["warning"], "info": counts["info"]}
