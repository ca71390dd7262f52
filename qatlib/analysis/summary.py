"""``reports/summary.json``: the few numbers by which two versions of a model are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatlib.analysis.facts import STAGES, Facts
from qatlib.analysis.findings import Finding, severity_counts
from qatlib.analysis.goals import GoalResult, judge
from qatlib.errors import StageError

DIGITS = 6


def significant(value: float) -> float | int:
    """``value`` with 6 significant digits; integers stay as they are."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def read_metrics(reports: str | Path) -> dict[str, dict[str, float]]:
    """Metrics of all stages from ``reports/*/metrics.json``; a stage whose file is missing is left out.

    Raises StageError (QAT195) for a file that is not JSON of the form ``{stage: {name: number}}``.
    """
    found: dict[str, dict[str, float]] = {}
    for path in sorted(Path(reports).glob("*/metrics.json")):
        again = "Run that stage again: dvc repro --force --single-item <stage>"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StageError("QAT195", str(path), f"is not readable JSON ({error})", again) from None
        if not isinstance(document, dict) or not all(isinstance(values, dict) for values in document.values()):
            raise StageError("QAT195", str(path), "is not a mapping of one stage to its numbers", again)
        for stage, values in document.items():
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
            found.setdefault(stage, {}).update(numbers)
    return found


def missing_stages(facts: Facts, expected: Sequence[str]) -> list[str]:
    """Stages without a finite value of the scored metric."""
    return [stage for stage in expected if facts.value(stage) is None]


def stale_stages(facts: Facts, expected: Sequence[str]) -> list[str]:
    """Stages that have metrics although one before them has none: left over from an earlier run."""
    gone = missing_stages(facts, expected)
    first = expected.index(gone[0]) if gone else len(expected)
    return [stage for stage in expected[first:] if stage not in gone]


def build_summary(
    facts: Facts, findings: Sequence[Finding], latency_us: float | None = None, expected: Sequence[str] = STAGES
) -> dict[str, Any]:
    """Content of ``summary.json``: finite numbers of 6 significant digits, the same for the same facts.

    For each stage: the scored metric and ``images``; ``ratio.<stage>`` to float (inverted when lower is better);
    ``findings`` by severity; ``goals.passed`` and ``goals.failed``; ``latency_us`` where a compile result is given.
    Stages of ``expected`` without metrics are in ``missing``; later ones that still have some are in ``stale``, and
    fail their goals.
    """
    document: dict[str, Any] = {"metric": facts.metric, "higher_is_better": facts.higher_is_better, "ratio": {}}
    for stage in expected:
        numbers = {key: facts.value(stage, key) for key in (facts.metric, "images")}
        kept = {key: significant(value) for key, value in numbers.items() if value is not None}
        if "images" in kept:
            kept["images"] = int(kept["images"])
        if kept:
            document[stage] = kept
        ratio = facts.ratio(stage)
        if stage != "float" and ratio is not None:
            document["ratio"][stage] = significant(ratio)
    if latency_us is not None and math.isfinite(latency_us):
        document["latency_us"] = significant(latency_us)
    document["findings"] = severity_counts(findings)
    document["missing"] = missing_stages(facts, expected)
    document["stale"] = stale_stages(facts, expected)
    results = goal_results(document, facts)
    document["goals"] = {"passed": sum(r.met for r in results), "failed": sum(not r.met for r in results)}
    return dict(sorted(document.items()))


def goal_results(summary: Mapping[str, Any], facts: Facts) -> tuple[GoalResult, ...]:
    """Each goal of ``facts`` judged by the numbers of ``summary``."""
    return judge(facts.goals, summary, summary["stale"])
