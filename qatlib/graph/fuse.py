"""Fusion by the pattern table {conv, linear} [+ batch norm] [+ add] [+ relu | relu6 | clamp].

Each pass takes a graph and returns another. A convolution may stand on either side of the add. An intermediate that
something else reads is never fused away, nor is a node that is to stay alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from qatlib.graph.ir import INPUT, Graph, Node
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


def _only_reader(graph: Graph, users: dict[str, list[Node]], name: str) -> bool:
    return len(users[name]) == 1 and name not in graph.outputs


def fold_batch_norm(graph: Graph) -> Graph:
    """Multiply batch norm into the weights before it. Calls that share their modules share the folded weights too."""
    users, nodes, gone = graph.users(), graph.by_name(), {}
    folded: dict[str, Node] = {}
    shared: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
    for norm in graph.nodes:
        if norm.op != "batch_norm" or norm.alone:
            continue
        dense = nodes[norm.inputs[0]]
        if dense.op not in DENSE or not _only_reader(graph, users, dense.name):
            continue
        if dense.op == "linear" and len(dense.shape) != 2:
            continue
        key = (id(dense.params["weight"]), id(norm.params["mean"]))
        if key not in shared:
            shared[key] = _folded(dense, norm)
        folded[dense.name] = replace(dense, params=shared[key], fused=(*dense.fused, norm))
        gone[norm.name] = dense.name
    return graph.renamed([folded.get(n.name, n) for n in graph.nodes if n.name not in gone], gone)


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
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    users, nodes, gone = graph.users(), graph.by_name(), {}
    fused: dict[str, Node] = {}
    for add in graph.nodes:
        if add.op != "add" or add.alone or add.inputs[0] == add.inputs[1]:
            continue
        sides = [nodes[name] for name in add.inputs]
        fit = [
            side
            for side in sides
            if side.op in DENSE
            and side.shape == add.shape
            and len(side.inputs) == 1
            and "clamp" not in side.attrs
            and side.name not in gone
            and _only_reader(graph, users, side.name)
        ]
        if not fit or sides[0].shape != sides[1].shape:
            continue
        dense = max(fit, key=lambda side: order[side.name])
        other = next(name for name in add.inputs if name != dense.name)
        fused[add.name] = replace(dense, inputs=(*dense.inputs, other), fused=(*dense.fused, add))
        gone[add.name] = dense.name
    moved = {node.name for node in fused.values()}
    kept = [fused.get(n.name, n) for n in graph.nodes if n.name not in moved]
    return graph.renamed(kept, gone)


def fuse_clamp(graph: Graph) -> Graph:
    """relu, relu6 or clamp becomes the output clamp of the operator before it."""
    users, nodes, gone = graph.users(), graph.by_name(), {}
    fused: dict[str, Node] = {}
    for clamp in graph.nodes:
        if clamp.op != "clamp" or clamp.alone:
            continue
        source = nodes[clamp.inputs[0]]
        if not (source.op in BY_NAME and BY_NAME[source.op].takes_clamp) or "clamp" in source.attrs:
            continue
        if source.content != "float" or not _only_reader(graph, users, source.name):
            continue
        attrs = {**source.attrs, "clamp": clamp.attrs["clamp"]}
        fused[source.name] = replace(source, attrs=attrs, fused=(*source.fused, clamp))
        gone[clamp.name] = source.name
    return graph.renamed([fused.get(n.name, n) for n in graph.nodes if n.name not in gone], gone)


PASSES: tuple[Callable[[Graph], Graph], ...] = (
    drop_identities,
    drop_unread,
    fold_batch_norm,
    batch_norm_to_conv,
    fuse_add,
    fuse_clamp,
    look_past_masks,
)
