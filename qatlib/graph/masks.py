"""Which values are masks, and which nodes may look past them: a pass that goes from the readers to what they read.

A softmax takes for 0 what is far enough below the largest of its row, and a largest value does not depend on the
others. So do the sums, selections, positive factors and movements in between, as far as nothing else reads them. Their
calibration then leaves all codes to the values that count; the masks saturate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qatlib.graph.ir import CONSTANT, INPUT, OPAQUE, Graph, Node
from qatlib.ops.base import BY_NAME
from qatlib.ops.masks import BELOW, FILL, MASKED

_MOVED = ("reshape", "permute", "expand", "slice", "take", "gather", "pad")
_LARGEST = ("amax", "argmax", "topk")
Nodes = Mapping[str, Node]
Users = Mapping[str, Sequence[Node]]


@dataclass(frozen=True)
class Need:
    """What the readers of a value want of it; None in place of it is everything.

    With an ``axis`` (from the end): what is up to ``distance`` below the largest along it; without one, all but the
    masks. ``only_largest``: no more than the largest along the axis (of any axes where it is None).
    """

    axis: int | None = None
    distance: float | None = None
    only_largest: bool = False

    def without_axis(self) -> Need:
        return Need(None, self.distance)

    def times(self, factor: float) -> Need:
        """The need of x where this is the one of ``factor * x``."""
        return self if self.distance is None else replace(self, distance=self.distance / factor)

    def attribute(self, masks: float) -> list[float | None]:
        return [None if self.only_largest else self.axis, self.distance, masks]


def _both(a: Need | None, b: Need | None) -> Need | None:
    if a is None or b is None or a == b:
        return None if a is None or b is None else a
    for one, other in ((a, b), (b, a)):
        if one.only_largest and (other.axis is None or other.axis == one.axis) and not other.only_largest:
            return other
    distances = [need.distance for need in (a, b) if need.distance is not None]
    same = a.axis == b.axis and not (a.only_largest or b.only_largest)
    return Need(a.axis if same else None, max(distances, default=None))


def look_past_masks(graph: Graph) -> Graph:
    """Set ``below_maximum`` on every node whose calibration is to look past masks; see :mod:`qatlib.ops.masks`.

    Where its codes for masks have to be so low depends on inputs that hold masks, ``masked_inputs`` are their places.
    """
    nodes, users = graph.by_name(), graph.users()
    needs, masks = _needs(graph, nodes, users), _masks(graph, nodes)
    marked = []
    for node in graph.nodes:
        need = needs.get(node.name)
        if need is None and node.op == "where" and node.name in masks and _fill(node) <= FILL:
            need = Need(None, BELOW)
        by_row = need is not None and need.axis is not None and not need.only_largest
        owns = node.op in (INPUT, OPAQUE) or (node.op in BY_NAME and not BY_NAME[node.op].keeps_scale)
        if need is not None and owns and node.content == "float" and (by_row or node.name in masks):
            attrs = {**node.attrs, "below_maximum": need.attribute(masks.get(node.name, MASKED))}
            if masked := _masked_inputs(nodes, users, masks, node):
                attrs["masked_inputs"] = masked
                if node.op == "mul":
                    attrs["masked_factor"] = _factor(nodes, node)
            node = replace(node, attrs=attrs)
        marked.append(node)
    return replace(graph, nodes=tuple(marked))


def _masked_inputs(nodes: Nodes, users: Users, masks: Mapping[str, float], node: Node) -> list[int]:
    if node.op not in ("add", "sub", "mul", "cat", "where"):
        return []
    if node.op == "sub" and (_softmax_core(nodes, users, node) is not None or _is_log(nodes[node.inputs[1]])):
        return []
    return [i for i, name in enumerate(node.inputs) if name in masks and (node.op != "sub" or i == 0)]


# -- from the masks on -------------------------------------------------------------------------------------------------


def _masks(graph: Graph, nodes: Nodes) -> dict[str, float]:
    """The values that may hold masks, each with the number at or below which they are such."""
    found: dict[str, float] = {}
    for node in graph.nodes:  # an input is one only where it is added to something
        if node.op == "add":
            found.update((name, MASKED) for name in (_origin(nodes, i) for i in node.inputs) if name)
    for node in graph.nodes:
        held = [found[name] for name in node.inputs if name in found]
        if node.op == CONSTANT:
            value = node.params["value"]
            if value.dim() and bool((value <= MASKED).any()):
                found[node.name] = MASKED
        elif node.op == "where" and _fill(node) <= MASKED:
            found[node.name] = max([MASKED, *held])
        elif node.op == "mul":
            factor = _factor(nodes, node)
            if factor is not None and abs(factor) >= -MASKED and not _has_weights(nodes, node):
                found[node.name] = MASKED
            elif factor is not None and factor > 0 and held:
                found[node.name] = held[0] * factor
        elif held and node.op in ("add", "sub", "where", "cat", "quantize", *_MOVED):
            found[node.name] = max(held)
    return found


def _has_weights(nodes: Nodes, node: Node) -> bool:
    """Whether a value comes from a convolution or linear: then a large one is a result, not a mask."""
    seen, queue = set[str](), [node.name]
    while queue:
        found = nodes[queue.pop()]
        if found.op in ("conv", "conv_transpose", "linear"):
            return True
        new = {name for name in found.inputs if nodes[name].content == "float"} - seen
        seen |= new
        queue += new
    return False


def _origin(nodes: Nodes, name: str) -> str | None:
    """The input of the network that is ``name`` but for movements; None if it is something else."""
    while nodes[name].op in (*_MOVED, "quantize"):
        name = nodes[name].inputs[0]
    return name if nodes[name].op == INPUT and nodes[name].content == "float" else None


def _fill(node: Node) -> float:
    """The lowest number that a ``where`` puts in."""
    return min((x for side in ("true", "false") if (x := node.attrs.get(side)) is not None), default=math.inf)


def _factor(nodes: Nodes, node: Node) -> float | None:
    """The constant number that a ``mul`` multiplies by."""
    for name in node.inputs:
        if nodes[name].op == CONSTANT and nodes[name].params["value"].numel() == 1:
            return float(nodes[name].params["value"].detach())
    return None


# -- from the readers back ---------------------------------------------------------------------------------------------


def _needs(graph: Graph, nodes: Nodes, users: Users) -> dict[str, Need | None]:
    needs: dict[str, Need | None] = dict.fromkeys(graph.outputs)
    for node in reversed(graph.nodes):
        core = _softmax_core(nodes, users, node)
        if core is not None and core.distance is None:  # log_softmax: its own results hold masks as well
            needs[node.name] = Need(None, BELOW)
            needs.update((user.name, Need()) for user in users[node.name] if user.op == "sub")
        for name, asked in _asked(nodes, node, core, needs.get(node.name)):
            needs[name] = _both(needs[name], asked) if name in needs else asked
    return needs


def _asked(nodes: Nodes, node: Node, core: Need | None, need: Need | None) -> list[tuple[str, Need | None]]:
    """What ``node`` wants of each of its inputs, where its own readers want ``need`` of it."""
    inputs = node.inputs[:1] if node.op == "expand" else node.inputs
    if core is not None:
        x, largest = inputs
        return [(x, core if core.distance is not None else Need(None, BELOW)), (largest, None)]
    if node.op in _LARGEST and node.attrs.get("largest", True):
        axes = node.attrs["axes"] if node.op == "amax" else [node.attrs["axis"]]
        single = axes[0] - len(nodes[inputs[0]].shape) if len(axes) == 1 else None
        return [(inputs[0], Need(single, only_largest=True))]
    if need is None or "clamp" in node.attrs:
        return [(name, None) for name in inputs]
    if node.op in _MOVED:
        return [(inputs[0], _before(node, nodes[inputs[0]], need)), *((name, None) for name in inputs[1:])]
    if node.op in ("cat", "quantize"):
        return [(name, need) for name in inputs]
    if node.op == "add" or (node.op == "sub" and node.attrs.get("alpha", 1) > 0):
        return [(name, Need() if node.op == "add" or i == 0 else None) for i, name in enumerate(inputs)]
    if node.op == "where":
        return [(inputs[0], None), *((name, Need(None, need.distance or BELOW)) for name in inputs[1:])]
    factor = _factor(nodes, node) if node.op == "mul" else None
    passes = factor is not None and factor > 0
    return [(name, need.times(factor) if passes and factor else None) for name in inputs]


def _softmax_core(nodes: Nodes, users: Users, sub: Node) -> Need | None:
    """The need of x where ``sub`` is ``x - amax(x)`` of a softmax; without distance where it is a log_softmax's."""
    if sub.op != "sub" or len(sub.inputs) != 2 or nodes[sub.inputs[1]].op != "amax":
        return None
    x, largest = (nodes[name] for name in sub.inputs)
    if largest.inputs != (x.name,) or len(largest.attrs["axes"]) != 1 or sub.attrs.get("alpha", 1) != 1:
        return None
    readers = users[sub.name]
    exponentials = [r for r in readers if r.op == "unary" and r.attrs.get("function") == "exp"]
    logs = [r for r in readers if r.op == "sub" and r.inputs[0] == sub.name and _is_log(nodes[r.inputs[1]])]
    if len(exponentials) != 1 or len(exponentials) + len(logs) != len(readers):
        return None
    axis = largest.attrs["axes"][0] - len(x.shape)
    return Need(axis, None if logs else BELOW)


def _is_log(node: Node) -> bool:
    return node.op == "unary" and node.attrs.get("function") == "log"


def _before(node: Node, x: Node, need: Need) -> Need:
    """The need of ``x`` where this is the one of what ``node`` moves it to."""
    if need.axis is None:
        return need
    axis = _axis_before(node, x, need.axis + len(node.shape))
    if axis is None:
        return Need(None, only_largest=True) if need.only_largest else need.without_axis()
    return replace(need, axis=axis - len(x.shape))


def _axis_before(node: Node, x: Node, axis: int) -> int | None:
    """The axis of ``x`` that becomes ``axis`` with the same elements in every row; None if there is none."""
    if node.op == "permute":
        return int(node.attrs["dims"][axis])
    if node.op == "pad":
        return axis
    if node.op == "slice":
        return None if axis in node.attrs["axes"] else axis
    if node.op == "take":
        return None if axis == node.attrs["axis"] else axis
    if node.op == "expand":
        own = axis - (len(node.shape) - len(x.shape))
        return own if own >= 0 and x.shape[own] == node.shape[axis] else None
    if node.op != "reshape" or node.shape[axis] < 0:
        return None
    for own, size in enumerate(x.shape):
        parts = ((x.shape[:own], node.shape[:axis]), (x.shape[own + 1 :], node.shape[axis + 1 :]))
        if size == node.shape[axis] and all(math.prod(a) == math.prod(b) for a, b in parts):
            return own
    return None
