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
    """``guide`` names the lines of the tuning guide that the rule applies."""

    code: str
    guide: str
    check: Check


_RULES: dict[str, Rule] = {}


def rule(code: str, guide: str) -> Callable[[Check], Check]:
    """Register a function whose findings all have ``code``."""

    def register(check: Check) -> Check:
        if code in _RULES:
            raise TypeError(f"{code} is claimed by {_RULES[code].check.__name__} and {check.__name__}")
        _RULES[code] = Rule(code, guide, check)
        return check

    return register


def all_rules() -> tuple[Rule, ...]:
    """Every rule of this folder, by code."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return tuple(_RULES[code] for code in sorted(_RULES))


def run_rules(facts: Facts) -> tuple[Finding, ...]:
    """Findings of all rules: errors first, then by code, worst module first."""
    return ordered(finding for each in all_rules() for finding in each.check(facts))
