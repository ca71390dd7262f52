"""Cross-layer equalization (Nagel et al., 2019): the same function, with the ranges of its channels brought together.

``relu(k * x) = k * relu(x)`` for k > 0, so a channel between two convolutions may have any unit: dividing the weights
and bias that make it by s, and multiplying the weights that read it by s, changes nothing in float. With one scale per
tensor, a channel whose range is a hundredth of the largest keeps one or two of 127 codes; s brings it up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qatlib.fake.ptq.channels import is_open, readers
from qatlib.graph.fuse import DENSE
from qatlib.graph.ir import Graph, Node
from qatlib.qtype import DEAD

SWEEPS = 200
"""At most; chains of n operators need about n sweeps."""
CONVERGED = 1e-4
"""Largest relative change of a channel in a sweep that ends the iteration."""


@dataclass(frozen=True)
class Pair:
    """A convolution or linear whose output channels were equalized with what reads them.

    ``before`` and ``after`` are the largest over the smallest range of an output channel: of its weights and bias.
    """

    producer: str
    readers: tuple[str, ...]
    before: float
    after: float


class _Weights:
    """Working copy of one operator, float64 on the CPU."""

    def __init__(self, node: Node) -> None:
        self.weight, self.bias = (node.params[role].detach().cpu().double() for role in ("weight", "bias"))
        self.groups = int(node.attrs.get("groups", 1))
        self.unit = torch.ones_like(self.bias)

    def made(self) -> Tensor:
        """Range of every output channel ``[O]``: the bias is the weight of an input that is 1."""
        return torch.maximum(self.weight.abs().flatten(1).amax(1), self.bias.abs())

    def read(self) -> Tensor:
        """Largest weight that reads each input channel ``[I]``."""
        return self._by_input(self.weight).abs().amax((1, 3)).flatten()

    def divide(self, unit: Tensor) -> None:
        """Give output channels new units ``[O]``."""
        self.weight = self.weight / unit.view(-1, *[1] * (self.weight.dim() - 1))
        self.bias = self.bias / unit
        self.unit = self.unit * unit

    def multiply(self, unit: Tensor) -> None:
        """Undo units of input channels ``[I]``."""
        rows = self._by_input(self.weight) * unit.view(self.groups, 1, -1, 1)
        self.weight = rows.reshape(self.weight.shape)

    def _by_input(self, weight: Tensor) -> Tensor:
        """``[groups, O / groups, I / groups, k]``."""
        return weight.reshape(self.groups, len(weight) // self.groups, weight.shape[1], -1)


def equalize(graph: Graph, fixed: Container[str] = ()) -> tuple[Graph, tuple[Pair, ...]]:
    """A fused graph of the same function whose channels have like ranges, and the pairs that it found.

    A pair is a convolution (also transposed, depthwise) or linear without an addend, whose output is no output of the
    network and passes through homogeneous operators only (relu, leaky relu, PReLU, pooling, movements that keep
    channels apart) before convolutions and linears read it. A bound such as relu6's, an add, and weights shared by
    several calls end the search, as do nodes in ``fixed``: values whose scale the user gave.

    Channel c gets the unit ``s = sqrt(made / read)``, the ranges of the weights and bias that make it and of the
    weights that read it, until nothing moves; the result does not depend on the units that the model came with. What
    DFQ absorbs of high biases is left: it holds only approximately, and not at padded borders.
    """
    users = graph.users()
    shared = Counter(id(tensor) for node in graph.nodes for tensor in node.params.values())
    own = {node.name for node in graph.nodes if all(shared[id(tensor)] == 1 for tensor in node.params.values())}
    found: dict[str, list[tuple[Node, Tensor]]] = {}
    for node in graph.nodes:
        if node.op in DENSE and node.name in own and len(node.inputs) == 1 and is_open(node):
            reading = readers(graph, users, node, fixed)
            if reading and all(reader.name in own for reader, _ in reading):
                found[node.name] = reading
    involved = {node for name, reading in found.items() for node in (name, *(reader.name for reader, _ in reading))}
    weights = {node.name: _Weights(node) for node in graph.nodes if node.name in involved}
    before = {name: _spread(weights[name].made()) for name in found}
    for _ in range(SWEEPS):
        moved = [_balance(weights[name], [(weights[r.name], source) for r, source in found[name]]) for name in found]
        if max(moved, default=0.0) < CONVERGED:
            break
    pairs = tuple(
        Pair(name, tuple(reader.name for reader, _ in found[name]), before[name], _spread(weights[name].made()))
        for name in found
    )
    nodes = [_with(node, weights[node.name]) if node.name in weights else node for node in graph.nodes]
    return replace(graph, nodes=tuple(nodes)), pairs


def _balance(producer: _Weights, reading: list[tuple[_Weights, Tensor]]) -> float:
    """One step of one pair; the largest relative change of a unit. Channels that are dead or unread stay."""
    made = producer.made()
    read = torch.zeros_like(made)
    for reader, source in reading:
        real = source >= 0
        read.scatter_reduce_(0, source[real], reader.read()[real], "amax")
    unit = torch.where((made > DEAD) & (read > DEAD), (made / read).sqrt(), 1.0)
    producer.divide(unit)
    for reader, source in reading:
        reader.multiply(torch.where(source >= 0, unit[source.clamp(min=0)], 1.0))
    return float((unit - 1).abs().max())


def _spread(ranges: Tensor) -> float:
    """Largest over smallest range of the channels that are not dead."""
    alive = ranges[ranges > DEAD]
    return float(alive.max() / alive.min()) if len(alive) else 1.0


def _with(node: Node, weights: _Weights) -> Node:
    made = {
        role: nn.Parameter(new.to(old), requires_grad=old.requires_grad)
        for role, new, old in (
            ("weight", weights.weight, node.params["weight"]),
            ("bias", weights.bias, node.params["bias"]),
        )
    }
    fused = tuple(_in_units(norm, weights.unit) if norm.op == "batch_norm" else norm for norm in node.fused)
    return replace(node, params={**node.params, **made}, fused=fused)


def _in_units(norm: Node, unit: Tensor) -> Node:
    """A batch norm that was folded, as if it made its channels in the new units: what QAT takes out again."""
    made = {
        role: (norm.params[role].detach().cpu().double() / unit).to(norm.params[role]) for role in ("weight", "bias")
    }
    return replace(norm, params={**norm.params, **made})
