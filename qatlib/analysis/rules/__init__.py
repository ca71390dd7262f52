"""Rules: small functions from :class:`Facts` to findings, one file per rule or small family.

A function marked with :func:`rule` in a file of this folder is registered; no list names the rules. Each code has a
page in ``docs/rules/``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding, ordered

Check = Callable[[Facts], list[Finding]]


@dataclass(frozen=True)
class Rule:
    """``guide`` names the lines of the tuning guide that the rule applies.

    A ``symptom`` is a score that is too low: beside findings that say why, it comes last of its severity.
    """

    code: str
    guide: str
    check: Check
    symptom: bool = False


_RULES: dict[str, Rule] = {}


def rule(code: str, guide: str, symptom: bool = False) -> Callable[[Check], Check]:
    """Register a function whose findings all have ``code``."""

    def register(check: Check) -> Check:
        if code in _RULES:
            raise TypeError(f"{code} is claimed by {_RULES[code].check.__name__} and {check.__name__}")
        _RULES[code] = Rule(code, guide, check, symptom)
        return check

    return register


def all_rules() -> tuple[Rule, ...]:
    """Every rule of this folder, by code."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return tuple(_RULES[code] for code in sorted(_RULES))


def run_rules(facts: Facts) -> tuple[Finding, ...]:
    """Findings of all rules: errors first; causes before symptoms, then by code, worst module first."""
    rules = sorted(all_rules(), key=lambda each: (each.symptom, each.code))
    return ordered(finding for each in rules for finding in each.check(facts))
