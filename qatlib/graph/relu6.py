"""relu to relu6 behind convolutions: bounds a range by structure, so that 8 bits resolve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qatlib.graph.fuse import DENSE
from qatlib.graph.ir import Graph, Node

BOUND = 6.0


def bounded_by(graph: Graph, names: Iterable[str]) -> Graph:
    """A fused graph in which the named operators end in relu6; each is one of :func:`relus`."""
    chosen = set(names)
    return replace(graph, nodes=tuple(_bounded(node) if node.name in chosen else node for node in graph.nodes))


def relus(graph: Graph) -> Mapping[str, str]:
    """Name → operator of every {conv, linear} [+ batch norm] [+ add] + relu; the relu and all in it bear its names."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if _ends_in_relu(node):
            found |= dict.fromkeys((node.name, *node.absorbed), node.name)
    return found


def _ends_in_relu(node: Node) -> bool:
    return node.op in DENSE and list(node.attrs.get("clamp", ())) == [0.0, None]


def _bounded(node: Node) -> Node:
    return replace(node, attrs={**node.attrs, "clamp": [0.0, BOUND]})
