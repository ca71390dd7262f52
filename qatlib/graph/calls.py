"""Calls of modules that a model calls several times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qatlib.graph.ir import Node


def calls_of_shared(nodes: Iterable[Node]) -> Mapping[str, tuple[int, int]]:
    """Of every node that a module called several times made: which call it is, from 1, and how many there are.

    The steps of a composite are one call.
    """
    calls: dict[str, dict[str, list[str]]] = {}
    for node in nodes:
        if node.module:
            calls.setdefault(node.module, {}).setdefault(node.composite or node.name, []).append(node.name)
    return {
        name: (number, len(made))
        for made in calls.values()
        if len(made) > 1
        for number, names in enumerate(made.values(), 1)
        for name in names
    }
