"""relu6 for relu behind convolutions: which relus count, and that nothing else changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.fake.prepare import fuse_fx
from qatlib.graph.ir import Graph
from qatlib.graph.relu6 import bounded_by, relus
from qatlib.graph.same import evaluate_graph
from tests.models import images, model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x)


def fused() -> Graph:
    """conv-relu, conv-bn-add-relu, a relu behind a pool, a relu6, linear-relu and a linear."""

    def body(m: nn.Module, x: Tensor) -> Tensor:
        x = m.block(F.relu(m.stem(x)))
        x = m.loose(m.pool(x))
        x = m.six(m.second(x)).mean((2, 3))
        return m.head(m.last(m.hidden(x)))

    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {
        "stem": nn.Conv2d(3, 8, 3),
        "block": Residual(),
        "pool": nn.AvgPool2d(2),
        "loose": nn.ReLU(),
        "second": nn.Conv2d(8, 8, 1),
        "six": nn.ReLU6(),
        "hidden": nn.Linear(8, 8),
        "last": nn.ReLU(),
        "head": nn.Linear(8, 4),
    }
    return fuse_fx(model(body, **parts), (images(2),))


def clamps(graph: Graph) -> dict[str, list[float | None]]:
    return {node.name: list(node.attrs["clamp"]) for node in graph.nodes if "clamp" in node.attrs}


def test_the_relus_are_those_of_convolutions_and_linears() -> None:
    graph = fused()
    assert set(relus(graph).values()) == {"stem", "block.conv", "hidden"}
    assert relus(graph)["block.act"] == "block.conv"
    assert relus(graph)["relu"] == "stem"
    assert "loose" not in relus(graph)
    assert "six" not in relus(graph)


def test_the_named_ones_are_bounded_and_the_rest_is_the_same() -> None:
    before = fused()
    after = bounded_by(before, ["block.conv"])
    assert clamps(after) == {**clamps(before), "block.conv": [0.0, 6.0]}
    assert [(n.name, n.op, n.inputs, n.absorbed) for n in after.nodes] == [
        (n.name, n.op, n.inputs, n.absorbed) for n in before.nodes
    ]
    assert bounded_by(before, []) == before
    assert set(relus(after).values()) == {"stem", "hidden"}


def test_it_computes_relu6() -> None:
    graph, x = fused(), images(2) * 20
    probe = Graph(graph.nodes[:3], ("block.conv",), graph.structure)
    (plain,) = evaluate_graph(probe, [x])
    (bounded,) = evaluate_graph(bounded_by(probe, ["block.conv"]), [x])
    assert float(plain.max()) > 6
    assert torch.equal(bounded, plain.clamp(max=6))
