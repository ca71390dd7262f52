"""The check that a graph computes what its model does: what it finds, and what it takes for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import GraphError
from qatlib.fake.prepare import fuse_fx
from qatlib.graph import same
from qatlib.graph.fuse import fuse
from qatlib.graph.same import check_same
from qatlib.graph.trace import trace
from tests.models import lively, model

Body = Callable[[Any, Tensor], Any]


def against(graph_of: Body, model_is: Body, *inputs: Tensor, **parts: Any) -> None:
    """Check the graph of one model against another."""
    check_same(model(model_is, **parts), fuse(trace(model(graph_of, **parts), inputs)), inputs)


SMALL = torch.tensor([1e-3] + [0.0] * 31)
HUGE = torch.tensor([1e6] + [0.0] * 31)
DAMAGE: dict[str, tuple[Body, Body]] = {
    "one element, by a thousandth": (lambda s, x: x, lambda s, x: x + SMALL),
    "beside a much larger element": (lambda s, x: x + HUGE, lambda s, x: x + HUGE + SMALL.roll(1)),
    "beside masked elements": (
        lambda s, x: x.masked_fill(x > 0, -1e9),
        lambda s, x: x.masked_fill(x > 0, -1e9) + SMALL.roll(1) * (x <= 0),
    ),
    "one integer of 32": (
        lambda s, x: (x > 0).long().sum((1, 2)),
        lambda s, x: (x > 0).long().sum((1, 2)) + (x[:, 0, 0] > 0.5),
    ),
    "the batch size": (lambda s, x: x * 1.0, lambda s, x: x * (1 + (x.size(0) - 2) * 1e-3)),
    "one of several outputs": (lambda s, x: (x, x * 2), lambda s, x: (x, x * 2 + SMALL)),
}


@pytest.mark.parametrize(("graph_of", "model_is"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found(graph_of: Body, model_is: Body) -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    against(graph_of, graph_of, x)
    with pytest.raises(GraphError, match=r"QAT137 .*differs in \d+ of \d+ elements"):
        against(graph_of, model_is, x)


def test_a_constant_of_the_example_is_found_on_other_inputs() -> None:
    x = torch.rand(1, 8)
    largest = float(x.max())
    with pytest.raises(GraphError, match="QAT137"):
        against(lambda s, x: x * largest, lambda s, x: x * x.amax(1, keepdim=True), x)


def test_a_shape_that_differs_is_told() -> None:
    with pytest.raises(GraphError, match=r"QAT137 .*has the shape \[2, 3\] for \[2, 3, 1\]"):
        against(lambda s, x: x.mean(2), lambda s, x: x.mean(2, keepdim=True), torch.randn(2, 3, 4))


def _deep() -> nn.Module:
    torch.manual_seed(0)
    layers = [part for _ in range(40) for part in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    return lively(nn.Sequential(nn.Conv2d(3, 16, 1), *layers)).eval()


class Cancelling(nn.Module):
    """What is left of large numbers: float32 keeps few digits of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)) + 1e5
        return F.layer_norm(y - y.mean(2, keepdim=True), (8,)) / (y - 1e5)


@pytest.mark.parametrize(
    ("net", "x"), [(_deep(), torch.randn(1, 3, 8, 8)), (lively(Cancelling()).eval(), torch.randn(2, 4, 8))]
)
def test_rounding_is_no_damage(net: nn.Module, x: Tensor) -> None:
    fuse_fx(net, (x,))


def test_models_that_know_only_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with a float32 tensor that is no buffer; there, damage is looked for with a wider margin."""
    table = torch.randn(8, 8)
    monkeypatch.setattr(same, "AGREES", 0.0)
    x = torch.randn(2, 8)
    against(lambda s, x: x @ table, lambda s, x: x @ table * (1 + 1e-5), x)
    with pytest.raises(GraphError, match="QAT137"):
        against(lambda s, x: x @ table, lambda s, x: x @ table + SMALL[:8] * 100, x)


def test_equal_values_may_come_in_any_order_of_topk() -> None:
    against(
        lambda s, x: F.relu(x).topk(2, -1)[1],
        lambda s, x: F.relu(x).topk(2, -1)[1] + (torch.arange(400) == 3).view(1, 200, 2).long(),
        torch.randn(2, 200, 8),
    )


def test_inputs_that_are_only_legal_together() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor, start: Tensor) -> Tensor:
            if not isinstance(start, torch.fx.Proxy) and bool((x[:, 0] > x[:, -1]).any()):
                raise ValueError("unsorted")
            return x + start

    fuse_fx(Chosen(), (torch.arange(8.0)[None], torch.ones(1, 1)))


def test_the_model_is_run_once_at_each_of_two_batch_sizes_and_once_more_in_doubt() -> None:
    net, sizes = _deep(), list[int]()
    x = torch.randn(4, 3, 8, 8)
    graph = fuse(trace(net, (x,)))
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    net.train()
    check_same(net, graph, (x,))
    assert sizes in ([2, 3], [2, 2, 3, 3])
    assert net.training


@pytest.mark.parametrize(
    ("body", "count", "seen"),
    [
        (lambda x, y: x + y, 2, "1 inputs for 2"),
        (lambda x: (x, x + 1), 1, "1 outputs for 2"),
    ],
)
def test_a_forward_of_the_model_alone_is_named(body: Callable[..., Any], count: int, seen: str) -> None:
    net = nn.Sequential(nn.ReLU())
    net.forward = body  # type: ignore[method-assign]
    with pytest.raises(GraphError, match=f"QAT137 Sequential: .*it has {seen}"):
        fuse_fx(net, [torch.randn(2, 4)] * count)
