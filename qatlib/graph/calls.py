"""Calls of modules that a model calls several times, and the names by which one or all of them are meant.

The calls of module ``c`` are named ``c``, ``c#1``, ``c#2``, … and the steps of a composite ``c.exp``, ``c#1.exp``, ….
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar


class Called(Protocol):
    """What a call of ``module`` made; the name of the module is the first part of its own."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...


C = TypeVar("C", bound=Called)


def _split(name: str, module: str) -> tuple[str, str] | None:
    """Number of the call, as ``#1`` or empty, and the step inside of it; None for another name than such a one."""
    found = re.fullmatch(rf"{re.escape(module)}(#\d+)?(\..*)?", name) if module else None
    return None if found is None else (found[1] or "", found[2] or "")


def calls_of_shared(made: Iterable[Called]) -> Mapping[str, tuple[int, int]]:
    """Of all that modules called several times made: which call it is, from 1, and how many there are, by name.

    The steps of a composite are one call.
    """
    calls: dict[str, dict[str, list[str]]] = {}
    for one in made:
        if one.module:
            parts = _split(one.name, one.module)
            calls.setdefault(one.module, {}).setdefault(parts[0] if parts else one.name, []).append(one.name)
    return {
        name: (number, len(each))
        for each in calls.values()
        if len(each) > 1
        for number, names in enumerate(each.values(), 1)
        for name in names
    }


def all_calls(name: str, module: str) -> str:
    """The name that means the same of every call of ``module``: ``c.exp`` of ``c#1.exp``."""
    parts = _split(name, module)
    return name if parts is None else f"{module}{parts[1]}"


def first_call(name: str, module: str) -> str:
    """The name that means it of the first call alone, where without a number it means all: ``c#0.exp`` of ``c.exp``."""
    parts = _split(name, module)
    return name if parts is None or parts[0] else f"{module}#0{parts[1]}"


def further_names(made: Iterable[C]) -> Iterator[tuple[str, C]]:
    """What was made by modules called several times, under the names that a user may write besides its own."""
    made = list(made)
    calls = calls_of_shared(made)
    for one in made:
        if one.name in calls:
            yield all_calls(one.name, one.module), one
            if calls[one.name][0] == 1:
                yield first_call(one.name, one.module), one
