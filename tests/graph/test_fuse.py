"""Fusion: what is merged, what is left, and that the folded graph is within 1e-5 of the model in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.errors import GraphError
from qatlib.fake.prepare import fuse_fx
from qatlib.graph.fuse import fuse
from qatlib.graph.ir import Graph, Node
from qatlib.graph.same import evaluate_graph
from qatlib.graph.trace import trace
from qatlib.graph.verify import verify
from tests.models import Block, calibrated, everything, images, lively, model


def fused(net: nn.Module, x: Tensor) -> Graph:
    """The fused graph of ``net``, its outputs within 1e-5 of the model in double precision."""
    graph = fuse(trace(net, (x,)))
    with torch.no_grad():
        wanted = copy.deepcopy(net).double()(x.double())
        got = evaluate_graph(graph, [x])
    for a, b in zip(wanted if isinstance(wanted, tuple) else (wanted,), got, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(a.abs().max()))
    return graph


def shown(graph: Graph) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    return [(n.name, n.op, n.inputs, n.absorbed) for n in graph.nodes if n.op != "input"]


def conv(i: int = 4, o: int = 4, **options: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **options)  # type: ignore[arg-type]


def test_conv_bn_relu() -> None:
    graph = fused(model(lambda s, x: F.relu(s.b(s.c(x))), c=conv(bias=False), b=nn.BatchNorm2d(4)), images(2, 4, 6))
    assert shown(graph) == [("c", "conv", ("x",), ("b", "relu"))]
    assert graph.nodes[-1].attrs["clamp"] == [0.0, None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (2, 4, 9)),
        (nn.Conv2d, nn.BatchNorm2d, (2, 4, 9, 5)),
        (nn.Conv3d, nn.BatchNorm3d, (2, 4, 3, 4, 5)),
    ],
)
def test_batch_norm_folds_in_every_dimension(
    layer: Callable[..., nn.Module], norm: Callable[..., nn.Module], shape: tuple[int, ...], bias: bool
) -> None:
    net = model(lambda s, x: s.b(s.c(x)), c=layer(4, 6, 3, padding=1, groups=2, bias=bias), b=norm(6))
    assert shown(fused(net, torch.randn(shape))) == [("c", "conv", ("x",), ("b",))]


def test_batch_norm_without_weights_folds() -> None:
    fused(model(lambda s, x: s.b(s.c(x)), c=conv(), b=nn.Sequential(nn.BatchNorm2d(4, eps=0.1))), images(2, 4, 5))
    net = nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)).eval()
    net[1].running_var.fill_(3.0)
    assert len(shown(fused(net, images(2, 4, 5)))) == 1


def test_linear_bn() -> None:
    net = model(lambda s, x: F.relu6(s.b(s.l(x))), l=nn.Linear(5, 3), b=nn.BatchNorm1d(3))
    assert shown(fused(net, torch.randn(4, 5))) == [("l", "linear", ("x",), ("b", "relu6"))]


def test_bn_over_another_axis_than_the_linear_does_not_fold() -> None:
    net = model(lambda s, x: s.b(s.l(x)), l=nn.Linear(5, 3), b=nn.BatchNorm1d(7))
    assert [row[:2] for row in shown(fused(net, torch.randn(4, 7, 5)))] == [("l", "linear"), ("b", "conv")]


def test_standalone_bn_becomes_a_depthwise_convolution() -> None:
    net = model(lambda s, x: F.relu(s.b(F.max_pool2d(x, 2))), b=nn.BatchNorm2d(4))
    graph = fused(net, images(2, 4, 6))
    node = graph.by_name()["b"]
    assert shown(graph)[1] == ("b", "conv", ("max_pool2d",), ("relu",))
    assert node.attrs["groups"] == 4
    assert tuple(node.params["weight"].shape) == (4, 1, 1, 1)


SIDES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[tuple[str, tuple[str, ...]]]]] = {
    "conv on the left": (lambda s, x: F.relu(s.b(s.c(x)) + x), [("c", ("x", "x"))]),
    "conv on the right": (lambda s, x: F.relu(x + s.b(s.c(x))), [("c", ("x", "x"))]),
    "both, the later wins": (lambda s, x: F.relu(s.b(s.c(x)) + s.d(x)), [("c", ("x",)), ("d", ("x", "c"))]),
    "both, the first operand is later": (
        lambda s, x: (lambda d: F.relu(s.b(s.c(x)) + d))(s.d(x)),
        [("d", ("x",)), ("c", ("x", "d"))],
    ),
}


@pytest.mark.parametrize(("body", "wanted"), SIDES.values(), ids=SIDES.keys())
def test_conv_bn_add_relu(
    body: Callable[[nn.Module, Tensor], Tensor], wanted: list[tuple[str, tuple[str, ...]]]
) -> None:
    net = model(body, c=conv(bias=False), b=nn.BatchNorm2d(4), d=conv())
    graph = fused(net, images(2, 4, 6))
    assert [(n.name, n.inputs) for n in graph.nodes if n.op != "input"] == wanted
    assert graph.nodes[-1].absorbed[-2:] == ("add", "relu")
    assert "clamp" in graph.nodes[-1].attrs


def test_an_addend_made_after_the_convolution() -> None:
    graph = fused(model(lambda s, x: (lambda c: c + F.max_pool2d(x, 1))(s.c(x)), c=conv()), images(2, 4, 6))
    assert [n.name for n in graph.nodes] == ["x", "max_pool2d", "c"]


def test_a_chain_of_adds() -> None:
    net = model(lambda s, x: s.a(x) + s.b(x) + s.c(x) + x, a=conv(), b=conv(), c=conv())
    assert [(n, op, i) for n, op, i, _ in shown(fused(net, images(2, 4, 6)))] == [
        ("a", "conv", ("x",)),
        ("b", "conv", ("x", "a")),
        ("c", "conv", ("x", "b")),
        ("add#2", "add", ("c", "x")),
    ]


LEFT: dict[str, tuple[Callable[[nn.Module, Tensor], object], list[str]]] = {
    "another reader": (lambda s, x: (lambda y: F.relu(y) + y)(s.c(x)), ["conv", "clamp", "add"]),
    "bn, another reader": (lambda s, x: (lambda y: s.b(y) + y)(s.c(x)), ["conv", "conv"]),
    "an output": (lambda s, x: (lambda y: (y, F.relu(y)))(s.c(x)), ["conv", "clamp"]),
    "bn on an output": (lambda s, x: (lambda y: (y, s.b(y)))(s.c(x)), ["conv", "conv"]),
    "add, an output": (lambda s, x: (lambda y: (y, y + x))(s.c(x)), ["conv", "add"]),
    "add of itself": (lambda s, x: (lambda y: y + y)(s.c(x)), ["conv", "add"]),
    "relu before the add": (lambda s, x: F.relu(s.c(x)) + x, ["conv", "add"]),
    "two clamps": (lambda s, x: F.relu6(F.relu(s.c(x))), ["conv", "clamp"]),
    "broadcast addend": (lambda s, x: s.c(x) + F.adaptive_avg_pool2d(x, 1), ["conv", "adaptive_avg_pool", "add"]),
    "relu after a pool": (lambda s, x: F.relu(F.avg_pool2d(x, 2)), ["avg_pool", "clamp"]),
    "relu after an add": (lambda s, x: F.relu(F.max_pool2d(x, 1) + x), ["max_pool", "add"]),
}


@pytest.mark.parametrize(("body", "wanted"), LEFT.values(), ids=LEFT.keys())
def test_what_stays_apart(body: Callable[[nn.Module, Tensor], object], wanted: list[str]) -> None:
    graph = fused(model(body, c=conv(), b=nn.BatchNorm2d(4)), images(2, 4, 6))
    assert [n.op for n in graph.nodes if n.op != "input"] == wanted


def test_identities_vanish_and_outputs_follow() -> None:
    net = model(lambda s, x: s.d(s.c(x).contiguous()), c=conv(), d=nn.Sequential(nn.Dropout(), nn.Identity()))
    graph = fused(net, images(2, 4, 6))
    assert graph.outputs == ("c",)
    assert len(graph.nodes) == 2


def test_shared_conv_and_bn_share_the_folded_weights() -> None:
    graph = fused(model(lambda s, x: s.b(s.c(F.relu(s.b(s.c(x))))), c=conv(), b=nn.BatchNorm2d(4)), images(2, 4, 6))
    first, second = graph.by_name()["c"], graph.by_name()["c#1"]
    assert first.params["weight"] is second.params["weight"]
    assert first.params["bias"] is second.params["bias"]


def test_a_shared_conv_with_two_norms_has_two_sets_of_weights() -> None:
    net = model(lambda s, x: s.a(s.c(F.relu(s.b(s.c(x))))), c=conv(), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))
    lively(net.a, 5)
    graph = fused(net, images(2, 4, 6))
    assert graph.by_name()["c"].params["weight"] is not graph.by_name()["c#1"].params["weight"]


def test_whole_nets_equal_their_double() -> None:
    graph = fused(everything(), images(3))
    assert graph.by_name()["block.conv"].absorbed == ("block.bn", "block.add", "block.relu")
    assert graph.by_name()["alone"].op == "conv"
    net = lively(nn.Sequential(Block(4), Block(4), nn.Flatten(), nn.Linear(4 * 36, 3))).eval()
    assert [n.op for n in fused(net, images(3, 4, 6)).nodes] == ["input", "conv", "conv", "reshape", "linear"]


def test_passes_do_not_change_the_graph_they_are_given() -> None:
    graph = trace(everything(), (images(1),))
    before = [(n.name, n.op, n.inputs, dict(n.attrs), n.absorbed) for n in graph.nodes]
    fuse(graph)
    assert [(n.name, n.op, n.inputs, dict(n.attrs), n.absorbed) for n in graph.nodes] == before


BROKEN: dict[str, tuple[Callable[[tuple[Node, ...]], tuple[Node, ...]], str]] = {
    "duplicate": (lambda nodes: (*nodes, nodes[-1]), "two nodes"),
    "order": (lambda nodes: (nodes[0], nodes[2], nodes[1]), "before it is made"),
    "operator": (lambda nodes: (*nodes[:-1], replace(nodes[-1], op="no_such_operator")), "not registered"),
    "shape": (lambda nodes: (*nodes[:-1], replace(nodes[-1], shape=())), "no shape"),
    "batch": (lambda nodes: (*nodes[:-1], replace(nodes[-1], shape=(-1, -1))), "two batch axes"),
    "output": (lambda nodes: nodes[:-1], "no node makes"),
}


@pytest.mark.parametrize(("damage", "seen"), BROKEN.values(), ids=BROKEN.keys())
def test_verify_names_the_pass_and_the_node(damage: Callable[[tuple[Node, ...]], tuple[Node, ...]], seen: str) -> None:
    graph = trace(model(lambda s, x: s.d(s.c(x)), c=conv(), d=conv()), (images(1, 4, 5),))
    assert verify(graph, "trace") is graph
    with pytest.raises(GraphError, match="QAT139") as caught:
        verify(replace(graph, nodes=damage(graph.nodes)), "some_pass")
    assert seen in caught.value.seen
    assert "some_pass" in caught.value.seen
    assert caught.value.where in ("c", "d")


def test_a_clamp_of_integers_stays() -> None:
    ids = torch.arange(10)[None]
    graph = fuse_fx(model(lambda s, x: ((x - 3).clamp(min=0), x * 0.5)), [ids])
    assert evaluate_graph(graph, [ids])[0].tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5, 6]]
    fake = calibrated(model(lambda s, x: ((x - 3).clamp(min=0), x * 0.5)), ids)
    assert convert_fx(fake)(ids)[0].tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm(4), None], ids=["SyncBatchNorm", "F.batch_norm"])
def test_other_forms_of_batch_norm_fold(norm: nn.Module | None) -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.conv(x)
        return s.norm(y) if norm else F.batch_norm(y, s.mean, s.var, s.scale, None, eps=1e-3)

    parts = {"norm": norm} if norm else {"scale": nn.Parameter(torch.rand(4) + 0.5)}
    net = model(body, conv=nn.Conv2d(3, 4, 3), **parts)
    net.register_buffer("mean", torch.randn(4))
    net.register_buffer("var", torch.rand(4) + 0.5)
    graph = fuse_fx(net, [images()])
    assert [node.op for node in graph.nodes] == ["input", "conv"]
