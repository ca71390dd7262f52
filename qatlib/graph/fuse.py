"""Fusion by the pattern table {conv, linear} [+ batch norm] [+ add] [+ relu | relu6 | clamp].

Each pass takes a graph and returns another. A convolution may stand on either side of the add. An intermediate that
something else reads is never fused away, nor is a node that is to stay alone. What a pass leaves alone it notes with
the reason in :attr:`Graph.apart`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from qatlib.graph.ir import INPUT, OPAQUE, Apart, Graph, Node
from qatlib.graph.masks import look_past_masks
from qatlib.graph.verify import verify
from qatlib.ops.base import BY_NAME
from qatlib.ops.batch_norm import affine

DENSE = ("conv", "conv_transpose", "linear")


def fuse(graph: Graph) -> Graph:
    """All passes in order, each verified."""
    for one in PASSES:
        graph = verify(one(graph), one.__name__)
    return graph


def drop_identities(graph: Graph) -> Graph:
    """Remove dropout, identity, contiguous and the like."""
    gone = {node.name: node.inputs[0] for node in graph.nodes if node.op == "identity"}
    return graph.renamed([node for node in graph.nodes if node.name not in gone], gone)


def drop_unread(graph: Graph) -> Graph:
    """Remove what nobody reads: the second result of a call of which the model uses the first."""
    read = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in read:
            read.update(node.inputs)
    return replace(graph, nodes=tuple(n for n in graph.nodes if n.name in read or n.op == INPUT))


@dataclass(frozen=True)
class _View:
    """A graph on which a pass looks for the operator that a node can join, or for the reason why there is none."""

    graph: Graph

    @cached_property
    def users(self) -> dict[str, list[Node]]:
        return self.graph.users()

    @cached_property
    def nodes(self) -> dict[str, Node]:
        return self.graph.by_name()

    def needed(self, part: Node, host: Node) -> Apart | None:
        """That something besides ``part`` needs the value of ``host`` as it is."""
        if others := tuple(user.name for user in self.users[host.name] if user.name != part.name):
            return Apart(part, "readers", host.name, others)
        return Apart(part, "output", host.name) if host.name in self.graph.outputs else None

    def unlike(self, part: Node, source: Node) -> Apart:
        """That ``source``, which ``part`` reads, is nothing to join: a convolution or linear may lie before it."""
        between = [source.name]
        while source.op not in DENSE:
            if source.op == OPAQUE:
                return Apart(part, "kept whole", "", tuple(between))
            if source.op not in BY_NAME or not BY_NAME[source.op].keeps_scale:
                return Apart(part, "nothing", "", tuple(between[:1]))
            source = self.nodes[source.inputs[0]]
            between.append(source.name)
        return Apart(part, "order", source.name, tuple(between[:-1]))

    def norm_host(self, norm: Node) -> Node | Apart:
        """The convolution or linear whose weights take the batch norm."""
        dense = self.nodes[norm.inputs[0]]
        if norm.alone:
            return Apart(norm, "float", dense.name)
        if dense.op not in DENSE:
            return self.unlike(norm, dense)
        if dense.op == "linear" and len(dense.shape) != 2:
            return Apart(norm, "shape", dense.name)
        return self.needed(norm, dense) or dense

    def add_host(self, add: Node, gone: dict[str, str]) -> Node | Apart:
        """The convolution or linear whose accumulator takes the add: of two, the later one.

        ``gone`` maps what this pass has fused already to where it went.
        """
        sides = [self.nodes[name] for name in add.inputs]
        if add.alone:
            return Apart(add, "float", sides[0].name)
        if sides[0].name == sides[1].name:
            return Apart(add, "itself", sides[0].name)
        found = [self._side(add, side, sides, gone) for side in sides]
        order = list(self.nodes)
        fit = [side for side in found if isinstance(side, Node)]
        if fit:
            return max(fit, key=lambda side: order.index(side.name))
        apart = [side for side in found if isinstance(side, Apart)]
        return min(apart, key=lambda side: (not side.host, side.reason == "order"))

    def _side(self, add: Node, side: Node, sides: list[Node], gone: dict[str, str]) -> Node | Apart:
        if side.name in gone:
            return Apart(add, "taken", gone[side.name], (side.name,))
        if side.op not in DENSE:
            return self.unlike(add, side)
        if side.shape != add.shape or sides[0].shape != sides[1].shape:
            return Apart(add, "shape", side.name)
        if len(side.inputs) > 1:
            return Apart(add, "taken", side.name, side.absorbed[-1:])
        if "clamp" in side.attrs:
            return Apart(add, "clamped", side.name, side.absorbed[-1:])
        return self.needed(add, side) or side

    def clamp_host(self, clamp: Node, gone: dict[str, str]) -> Node | Apart:
        """The operator whose output clamp it becomes."""
        source = self.nodes[clamp.inputs[0]]
        if clamp.alone:
            return Apart(clamp, "float", source.name)
        if source.content != "float":
            return Apart(clamp, "integers", source.name)
        if source.name in gone:
            return Apart(clamp, "clamped", gone[source.name], (source.name,))
        if not (source.op in BY_NAME and BY_NAME[source.op].takes_clamp):
            return self.unlike(clamp, source)
        if "clamp" in source.attrs:
            return Apart(clamp, "clamped", source.name, source.absorbed[-1:])
        return self.needed(clamp, source) or source


def fold_batch_norm(graph: Graph) -> Graph:
    """Multiply batch norm into the weights before it. Calls that share their modules share the folded weights too."""
    view, gone, apart = _View(graph), dict[str, str](), list[Apart]()
    folded: dict[str, Node] = {}
    shared: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
    for norm in graph.nodes:
        if norm.op != "batch_norm":
            continue
        dense = view.norm_host(norm)
        if isinstance(dense, Apart):
            apart.append(dense)
            continue
        key = (id(dense.params["weight"]), id(norm.params["mean"]))
        if key not in shared:
            shared[key] = _folded(dense, norm)
        folded[dense.name] = replace(dense, params=shared[key], fused=(*dense.fused, norm))
        gone[norm.name] = dense.name
    kept = [folded.get(n.name, n) for n in graph.nodes if n.name not in gone]
    return _noted(graph.renamed(kept, gone), apart)


def _noted(graph: Graph, apart: list[Apart]) -> Graph:
    return replace(graph, apart=(*graph.apart, *apart))


def _folded(dense: Node, norm: Node) -> dict[str, nn.Parameter]:
    factor, offset = affine(norm.attrs, norm.params)
    weight = dense.params["weight"].detach()
    with torch.no_grad():
        scaled = weight * factor.view(-1, *[1] * (weight.dim() - 1))
        bias = dense.params["bias"].detach() * factor + offset
    trainable = dense.params["weight"].requires_grad
    return {role: nn.Parameter(t, requires_grad=trainable) for role, t in (("weight", scaled), ("bias", bias))}


def batch_norm_to_conv(graph: Graph) -> Graph:
    """A batch norm that nothing absorbs is a depthwise convolution with a kernel of 1."""
    nodes = [part for node in graph.nodes for part in (_as_conv(node) if node.op == "batch_norm" else [node])]
    return replace(graph, nodes=tuple(nodes))


def _as_conv(norm: Node) -> list[Node]:
    """Over [batch, channels] the convolution is 1-d, between two reshapes that move nothing."""
    axes = max(1, len(norm.shape) - 2)
    factor, offset = (t.detach() for t in affine(norm.attrs, norm.params))
    attrs = {"stride": [1] * axes, "padding": [[0, 0]] * axes, "dilation": [1] * axes, "groups": len(factor)}
    params = {"weight": nn.Parameter(factor.view(-1, 1, *[1] * axes)), "bias": nn.Parameter(offset.clone())}
    conv = replace(norm, op="conv", attrs=attrs, params=params)
    if len(norm.shape) > 2:
        return [conv]
    bare = replace(norm, op="reshape", params={})
    shape = (norm.shape[0], len(factor), 1)
    wide = replace(bare, name=f"{norm.name}.wide", attrs={"shape": [-1, *shape[1:]]}, shape=shape)
    conv = replace(conv, name=f"{norm.name}.conv", inputs=(wide.name,), shape=shape)
    return [wide, conv, replace(bare, inputs=(conv.name,), attrs={"shape": [-1, shape[1]]})]


def fuse_add(graph: Graph) -> Graph:
    """``conv(x) + y`` in one accumulator. Of two convolutions the later one takes the add."""
    view, gone, apart = _View(graph), dict[str, str](), list[Apart]()
    fused: dict[str, Node] = {}
    for add in graph.nodes:
        if add.op != "add":
            continue
        dense = view.add_host(add, gone)
        if isinstance(dense, Apart):
            apart.append(dense)
            continue
        other = next(name for name in add.inputs if name != dense.name)
        fused[add.name] = replace(dense, inputs=(*dense.inputs, other), fused=(*dense.fused, add))
        gone[add.name] = dense.name
    moved = {node.name for node in fused.values()}
    kept = [fused.get(n.name, n) for n in graph.nodes if n.name not in moved]
    return _noted(graph.renamed(kept, gone), apart)


def fuse_clamp(graph: Graph) -> Graph:
    """relu, relu6 or clamp becomes the output clamp of the operator before it."""
    view, gone, apart = _View(graph), dict[str, str](), list[Apart]()
    fused: dict[str, Node] = {}
    for clamp in graph.nodes:
        if clamp.op != "clamp":
            continue
        source = view.clamp_host(clamp, gone)
        if isinstance(source, Apart):
            apart.append(source)
            continue
        attrs = {**source.attrs, "clamp": clamp.attrs["clamp"]}
        fused[source.name] = replace(source, attrs=attrs, fused=(*source.fused, clamp))
        gone[clamp.name] = source.name
    kept = [fused.get(n.name, n) for n in graph.nodes if n.name not in gone]
    return _noted(graph.renamed(kept, gone), apart)


PASSES: tuple[Callable[[Graph], Graph], ...] = (
    drop_identities,
    drop_unread,
    fold_batch_norm,
    batch_norm_to_conv,
    fuse_add,
    fuse_clamp,
    look_past_masks,
)
