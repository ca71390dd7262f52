"""What holds elements that an in-place call changed: views, what they are views of, and other views of that."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from qatlib.errors import GraphError
from qatlib.graph.ir import Node
from qatlib.ops.assign import written
from qatlib.ops.base import Call, Ref, Steps
from qatlib.ops.shape import reshape_to

_VIEWS = ("reshape", "permute", "slice", "expand", "identity")
"""Operators whose result may be a view of their first input."""


class Views:
    """Which values are views of which, and what each is after the changes so far.

    A value goes by its origin, the name of the node that it was before any change. ``steps`` takes the nodes that a
    change makes; ``nodes`` are all so far.
    """

    def __init__(self, steps: Steps, nodes: Sequence[Node]) -> None:
        self._steps, self._all = steps, nodes
        self._nodes: dict[str, Node] = {}
        self._origin: dict[str, str] = {}
        self._current: dict[str, Ref] = {}

    def change(self, where: str, old: Any, new: Ref, others: Sequence[Any]) -> list[Ref]:
        """What ``others``, which hold some of the elements of ``old``, are once that is ``new``.

        ``where`` is the line of the change. Raises GraphError QAT137 for one that is no reshaped, permuted or sliced
        view of old, nor old of it, nor both of another.
        """
        self._nodes = {node.name: node for node in self._all}
        call = Call(where, (), {}, steps=self._steps)
        up = self._chain(old)
        known = {up[0]: new} if up else {}
        changed = [self._again(call, up, known, other) for other in others]
        for name, value in known.items():
            self._origin[value.name], self._current[name] = name, value
        return changed

    def _again(self, call: Call, up: list[str], known: dict[str, Ref], other: Any) -> Ref:
        down = self._chain(other)
        shared = next((name for name in up if name in down), None)
        if shared is None:
            raise _refused(call)
        for part, name in itertools.pairwise(up[: up.index(shared) + 1]):
            if name not in known:
                known[name] = self._back(call, self._nodes[part], self._ref(name), known[part])
        for name, part in itertools.pairwise(reversed(down[: down.index(shared) + 1])):
            if part not in known:
                node = self._nodes[part]
                rest = [self._ref(i) for i in node.inputs[1:]]
                known[part] = call.emit(node.op, [known[name], *rest], node.attrs, suffix=".view")
        return known[down[0]]

    def _back(self, call: Call, view: Node, whole: Ref, value: Ref) -> Ref:
        """``whole`` after its view was changed to ``value``."""
        if view.op == "identity":
            return value
        if view.op == "reshape":
            op, attrs = reshape_to(whole.shape)
            return call.emit(op, [value], attrs, suffix=".back")
        if view.op == "permute":
            dims = view.attrs["dims"]
            return call.emit("permute", [value], {"dims": [dims.index(k) for k in range(len(dims))]}, suffix=".back")
        if view.op == "slice":
            axes, *cuts = (view.attrs[name] for name in ("axes", "starts", "stops", "steps"))
            return written(call, whole, dict(zip(axes, zip(*cuts, strict=True), strict=True)), value)
        raise _refused(call)

    def _chain(self, value: Any) -> list[str]:
        """Origins of the value, of what it may be a view of, and so on."""
        if not isinstance(value, Ref):
            return []
        names = [self._origin.get(value.name, value.name)]
        while (node := self._nodes[names[-1]]).op in _VIEWS:
            names.append(self._origin.get(node.inputs[0], node.inputs[0]))
        return names

    def _ref(self, name: str) -> Ref:
        node = self._nodes[name]
        return self._current.get(name, Ref(node.name, node.shape, node.content))


def _refused(call: Call) -> GraphError:
    return GraphError(
        "QAT137",
        call.where,
        "changes a tensor in place of which another tensor, read later, is part",
        "Compute a new tensor instead, with torch.where or torch.cat",
    )
