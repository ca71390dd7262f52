"""The graph between a torch model and its fake-quant form: plain values, rewritten only by pure passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import TreeSpec

from qatlib.ops.base import Content, Format

INPUT = "input"
CONSTANT = "constant"
OPAQUE = "opaque"
"""``op`` of a wrapped function or leaf module: float, never looked into."""


@dataclass(frozen=True)
class Node:
    """One operation and the tensor it makes.

    ``op`` is the name of an :class:`qatlib.ops.base.Operator`, ``input`` or ``opaque``. ``module`` is the qualified
    name of the called module, empty for functions; ``module_type`` the type or function that people know. ``shape`` has
    -1 for the batch, -k for k times the batch. ``scope`` holds name and type of the modules in whose forward the call
    was made, the outermost first, the called module last. ``fused`` are the nodes that became part of this one, in
    order; one that is ``alone`` never becomes part of another. ``where`` is the line of the user's source. An inner
    step of a composite bears the name of the whole call in ``composite``.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    module: str = ""
    module_type: str = ""
    where: str = ""
    scope: tuple[tuple[str, str], ...] = ()
    fused: tuple[Node, ...] = ()
    alone: bool = False
    callee: Callable[..., Any] | None = None
    content: Content = "float"
    format: Format | None = None
    composite: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        return self

    @property
    def absorbed(self) -> tuple[str, ...]:
        """Names of the nodes fused into this one."""
        return tuple(node.name for node in self.fused)

    def places(self) -> list[str]:
        """Qualified names of all that the call is part of, outermost first; its own name is the last.

        A module that holds others without being called, such as nn.ModuleList, is one of them.
        """
        paths = (*(path for path, _ in self.scope), self.name)
        parts = [path.split(".") for path in paths]
        return list(dict.fromkeys(".".join(p[:length]) for p in parts for length in range(1, len(p) + 1)))

    def types(self) -> list[tuple[str, str]]:
        """Qualified name and type of the modules that the call is part of, outermost first; its own are the last."""
        return [*self.scope, (self.name, self.module_type)]

    def is_under(self, name: str) -> bool:
        """Whether this, or a node fused into it, is the module or call ``name`` or part of it."""
        return any(name in node.places() for node in (self, *self.fused))

    def is_of(self, type_name: str) -> bool:
        """Whether this, or a node fused into it, is a call of that module type or function, or inside of one."""
        return any(type_name == kind for node in (self, *self.fused) for _, kind in node.types())

    def described(self) -> str:
        """Name with source line, for messages."""
        return f"{self.name} ({self.where})" if self.where else self.name


Reason = Literal[
    "readers", "output", "order", "shape", "taken", "itself", "clamped", "integers", "float", "kept whole", "nothing"
]
"""Why a node was not fused; :mod:`qatlib.analysis.unfused` says each in words."""


@dataclass(frozen=True)
class Apart:
    """A batch norm, add or clamp that fusion left alone.

    ``host`` is the nearest convolution or linear before it, which it could have joined, empty if there is none.
    ``between`` are the nodes that are in the way: other readers, what lies between the two, or what took its place.
    """

    node: Node
    reason: Reason
    host: str = ""
    between: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order. ``outputs`` are the leaves of the model's result, whose nesting is ``structure``.

    ``apart`` is what fusion left alone, in the order of its passes.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    structure: TreeSpec
    apart: tuple[Apart, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes if node.op == INPUT)

    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    def users(self) -> dict[str, list[Node]]:
        """Nodes that read each value, one entry per reading node."""
        table: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                table[name].append(node)
        return table

    def renamed(self, nodes: list[Node], names: Mapping[str, str]) -> Graph:
        """A graph of ``nodes`` in which every read of a key of ``names`` reads its value instead."""

        def final(name: str) -> str:
            while name in names:
                name = names[name]
            return name

        rewired = tuple(replace(n, inputs=tuple(final(i) for i in n.inputs)) for n in nodes)
        return replace(self, nodes=rewired, outputs=tuple(final(name) for name in self.outputs))
