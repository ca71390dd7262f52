"""Match strings of ``params.yaml``: an exact name, a glob, or a regular expression after ``re:``.

Every entry must name something that exists; all entries that do not are reported together.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from qatlib.errors import ConfigError


class _Record(Protocol):
    @property
    def match(self) -> str: ...


R = TypeVar("R", bound=_Record)


@dataclass(frozen=True)
class Pattern:
    """One match string. ``key`` is where it stands in ``params.yaml``, for messages."""

    text: str
    key: str = "match"

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        source = self.text[3:] if self.text.startswith("re:") else fnmatch.translate(self.text)
        try:
            return re.compile(source)
        except re.error as error:
            raise ConfigError(
                "QAT102", self.key, f"{self.text!r} is not a regular expression: {error}", "Correct the text after re:"
            ) from None

    def matches(self, name: str) -> bool:
        """Whether ``name`` itself is meant."""
        return name == self.text or self._regex.fullmatch(name) is not None

    def covers(self, name: str) -> bool:
        """Whether ``name`` or a module that contains it is meant: ``block1`` covers ``block1.conv``."""
        parts = name.split(".")
        return any(self.matches(".".join(parts[:length])) for length in range(len(parts), 0, -1))


def resolve(patterns: Sequence[str], names: Iterable[str], key: str) -> tuple[str, ...]:
    """The ``names`` that the match strings cover, containers included, in the order of ``names``.

    ``key`` is the list in ``params.yaml``, such as ``qat.hybrid``. Raises ConfigError QAT102, naming each entry that
    covers nothing or is not a regular expression.
    """
    names = list(names)
    compiled = _compile(patterns, key, "")
    hits = [{name for name in names if pattern.covers(name)} for pattern in compiled]
    _raise(_missed(compiled, hits, names), key)
    chosen = set[str]().union(*hits)
    return tuple(name for name in names if name in chosen)


def first_match(records: Sequence[R], names: Iterable[str], key: str) -> dict[str, R]:
    """For each name that a record matches exactly (containers are not expanded), the first such record.

    Raises ConfigError QAT102 for each record that matches nothing, or whose names all belong to earlier records.
    """
    names = list(names)
    compiled = _compile([record.match for record in records], key, ".match")
    hits = [{name for name in names if pattern.matches(name)} for pattern in compiled]
    problems = _missed(compiled, hits, names)
    winner: dict[str, int] = {}
    for index, found in enumerate(hits):
        for name in found:
            winner.setdefault(name, index)
        if found and index not in winner.values():
            earlier = sorted({winner[name] for name in found})
            others = ", ".join(compiled[other].key.removesuffix(".match") for other in earlier)
            problems.append(f"{compiled[index].key}: {compiled[index].text!r} is never used: {others} comes first")
    _raise(problems, key)
    return {name: records[winner[name]] for name in names if name in winner}


def first_owner(records: Sequence[R], owners: Mapping[str, Sequence[str]], key: str) -> dict[str, R]:
    """For each operator the first record that names it by any of its names; ``owners`` are the operators by name.

    Raises ConfigError QAT102 as :func:`first_match`, also for a record whose operators earlier ones have under other
    names.
    """
    named = first_match(records, owners, key)
    chosen: dict[str, int] = {}
    for index, record in enumerate(records):
        operators = [operator for name, found in named.items() if found is record for operator in owners[name]]
        for operator in operators:
            chosen.setdefault(operator, index)
        if index not in chosen.values():
            others = ", ".join(f"{key}[{other}]" for other in sorted({chosen[operator] for operator in operators}))
            _raise([f"{key}[{index}].match: {record.match!r} is never used: {others} comes first"], key)
    return {operator: records[index] for operator, index in chosen.items()}


def _compile(texts: Sequence[str], key: str, suffix: str) -> list[Pattern]:
    patterns = [Pattern(text, f"{key}[{index}]{suffix}") for index, text in enumerate(texts)]
    problems = []
    for pattern in patterns:
        try:
            pattern.matches("")
        except ConfigError as error:
            problems.append(f"{pattern.key}: {error.seen}")
    _raise(problems, key)
    return patterns


def _missed(patterns: Sequence[Pattern], hits: Sequence[set[str]], names: Sequence[str]) -> list[str]:
    known = {".".join(name.split(".")[:length]) for name in names for length in range(1, name.count(".") + 2)}
    problems = []
    for pattern, found in zip(patterns, hits, strict=True):
        if not found:
            close = difflib.get_close_matches(pattern.text, sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(map(repr, close))}?" if close else f"known are {_some(names)}"
            problems.append(f"{pattern.key}: {pattern.text!r} matches nothing; {hint}")
    return problems


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) or "no names at all"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _raise(problems: list[str], key: str) -> None:
    fix = "Use a module's exact name, a glob or re:<regular expression>"
    if len(problems) == 1:
        where, seen = problems[0].split(": ", 1)
        raise ConfigError("QAT102", where, seen, fix)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError("QAT102", key, f"{len(problems)} problems{lines}", f"\n{fix}")
