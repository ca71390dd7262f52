"""Cross-layer equalization: which pairs are found, that the function stays, and what int8 gets back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx, prepare_graph
from qatlib.fake.ptq.equalize import Pair, equalize
from qatlib.fake.qconfig import QConfig
from qatlib.graph.ir import Graph
from qatlib.graph.same import evaluate_graph
from tests.models import images, model


def conv(*sizes: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(*sizes, **options)


def spread_out(net: nn.Module, *names: str, decades: float = 3.0) -> nn.Module:
    """Multiply the output channels of the named modules by numbers over so many decades."""
    generator = torch.Generator().manual_seed(7)
    for name in names:
        part = net.get_submodule(name)
        factor = 10 ** (decades * (torch.rand(len(part.weight), generator=generator) - 0.5))
        with torch.no_grad():
            part.weight.mul_(factor.view(-1, *[1] * (part.weight.dim() - 1)))
            part.bias.mul_(factor)
    return net


def shuffled(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


def shuffle_net() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        return s.b(shuffled(F.relu(s.a(x))))

    return model(body, a=conv(3, 8, 1), b=conv(8, 6, 3, groups=2))


def transposed_net() -> nn.Module:
    def body(s: Any, x: Tensor) -> Tensor:
        return s.c(F.leaky_relu(s.b(F.relu(s.a(x))), 0.2))

    return model(
        body, a=conv(3, 8, 3), b=nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), c=nn.ConvTranspose2d(6, 2, 2)
    )


def pooled_net() -> nn.Module:
    """Depthwise, padded average, bilinear, PReLU per channel, flattened into a linear, whose channels are vectors."""

    def body(s: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(s.a(x)), 2, padding=1)
        x = s.act(F.avg_pool2d(s.b(x), 3, 2, 1))
        x = s.c(F.interpolate(x, scale_factor=2, mode="bilinear"))
        return s.e(F.relu(s.d(F.adaptive_avg_pool2d(x, 2).flatten(1))))

    parts = {"a": conv(3, 8, 3), "b": conv(8, 8, 3, groups=8), "c": conv(8, 5, 3), "act": nn.PReLU(8)}
    return model(body, **parts, d=nn.Linear(20, 7), e=nn.Linear(7, 3))


def two_readers_net() -> nn.Module:
    """Half of the channels goes each way; one way pads with zeros."""

    def body(s: Any, x: Tensor) -> Any:
        one, two = F.relu(s.a(x)).chunk(2, 1)
        return s.b(one), s.c(F.pad(two, (1, 2, 0, 1)))

    return model(body, a=conv(3, 8, 3), b=conv(4, 4, 1), c=conv(4, 4, 3))


FOUND: dict[str, tuple[Any, dict[str, tuple[str, ...]]]] = {
    "grouped behind a channel shuffle": (shuffle_net, {"a": ("b",)}),
    "transposed": (transposed_net, {"a": ("b",), "b": ("c",)}),
    "pools, PReLU, flatten": (pooled_net, {"a": ("b",), "b": ("c",), "c": ("d",), "d": ("e",)}),
    "two readers": (two_readers_net, {"a": ("b", "c")}),
}


def graph_of(net: nn.Module, x: Tensor) -> Graph:
    return fuse_fx(net.to(x.dtype), (x,))


@pytest.mark.parametrize(("make", "pairs"), FOUND.values(), ids=FOUND.keys())
def test_the_function_stays_and_the_ranges_meet(make: Any, pairs: dict[str, tuple[str, ...]]) -> None:
    torch.manual_seed(0)
    x = images(3).double()
    graph = graph_of(spread_out(make(), "a"), x)
    equal, found = equalize(graph)
    assert {pair.producer: tuple(sorted(pair.readers)) for pair in found} == pairs
    with torch.no_grad():
        for before, after in zip(evaluate_graph(graph, (x,)), evaluate_graph(equal, (x,)), strict=True):
            assert float((before - after).abs().max()) < 1e-9 * max(1.0, float(before.abs().max()))
    assert found[0].before > 1.5 * found[0].after, found
    moved, kept = equal.by_name(), graph.by_name()
    assert not torch.equal(moved["a"].params["weight"], kept["a"].params["weight"])
    assert moved["a"].params["weight"].requires_grad


def test_the_units_that_a_model_comes_with_do_not_matter() -> None:
    torch.manual_seed(1)
    net, x = pooled_net(), images(2).double()
    plain = equalize(graph_of(net, x))[0].by_name()
    with torch.no_grad():  # the same function in other units
        unit = torch.logspace(-2, 2, 8, dtype=torch.float64)
        net.a.weight.mul_(unit.view(-1, 1, 1, 1))
        net.a.bias.mul_(unit)
        net.b.weight.div_(unit.view(-1, 1, 1, 1))
    other = equalize(graph_of(net, x))[0].by_name()
    for name in "abcde":
        torch.testing.assert_close(plain[name].params["weight"], other[name].params["weight"], rtol=2e-3, atol=0)

    """At convergence the range that makes a channel is the range that reads it: the optimum of DFQ, equation 11."""
    torch.manual_seed(2)
    net = spread_out(shuffle_net(), "a")
    nodes = equalize(graph_of(net, images(1)))[0].by_name()
    a, b = (nodes[name].params["weight"].detach() for name in "ab")
    order = shuffled(torch.arange(8).view(1, 8, 1, 1)).flatten().tolist()  # input channel of b -> output channel of a
    for position, channel in enumerate(order):
        made = max(float(a[channel].abs().max()), float(nodes["a"].params["bias"].detach()[channel].abs()))
        group, column = divmod(position, 4)
        read = float(b[3 * group : 3 * group + 3, column].abs().max())
        assert made == pytest.approx(read, rel=1e-3)


def keeps(body: Any, **parts: Any) -> Any:
    return lambda: model(body, **{name: conv(*sizes) for name, sizes in parts.items()})


A, B, SQUARE = (3, 4, 1), (4, 4, 1), (3, 3, 1)
LEFT_ALONE: dict[str, Any] = {
    "relu6": keeps(lambda s, x: s.b(F.relu6(s.a(x))), a=A, b=B),
    "clamp from below": keeps(lambda s, x: s.b(s.a(x).clamp(min=-1)), a=A, b=B),
    "sigmoid": keeps(lambda s, x: s.b(s.a(x).sigmoid()), a=A, b=B),
    "a residual add": keeps(lambda s, x: s.b(s.a(x) + x), a=SQUARE, b=SQUARE),
    "read by a residual add": keeps(lambda s, x: (lambda y: s.b(y) + y)(F.relu(s.a(x))), a=A, b=B),
    "an output of the network": keeps(lambda s, x: (lambda y: (y, s.b(y)))(F.relu(s.a(x))), a=A, b=B),
    "a constant border": keeps(lambda s, x: s.b(F.pad(s.a(x), (1, 1, 1, 1), value=0.5)), a=A, b=B),
    "a sum over channels": keeps(lambda s, x: s.b(s.a(x).sum(1, keepdim=True)), a=A, b=(1, 4, 1)),
    "a maximum over channels": keeps(lambda s, x: s.b(s.a(x).amax(1, keepdim=True)), a=A, b=(1, 4, 1)),
    "a product": keeps(lambda s, x: s.b(s.a(x) * 2), a=A, b=B),
    "shared weights": keeps(lambda s, x: s.b(F.relu(s.a(F.relu(s.a(x))))), a=SQUARE, b=SQUARE),
    "channels that become width": keeps(lambda s, x: s.b(s.a(x).transpose(1, 3)), a=A, b=(8, 4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_is_not_homogeneous_ends_the_search(make: Any) -> None:
    graph = graph_of(make(), images(1)[:, :, :8, :8])
    equal, found = equalize(graph)
    assert not [pair for pair in found if pair.producer == "a"]
    assert equal.nodes == graph.nodes


def test_a_scale_that_the_user_fixed_stays_in_its_unit() -> None:
    graph = graph_of(transposed_net(), images(1))
    assert [pair.producer for pair in equalize(graph, fixed={"b"})[1]] == ["a"]
    behind = next(node.name for node in graph.nodes if node.op == "prelu")
    assert [pair.producer for pair in equalize(graph, fixed={behind})[1]] == ["a"]


def test_dead_and_unread_channels_stay() -> None:
    net = shuffle_net()
    with torch.no_grad():
        net.a.weight[1], net.a.bias[1] = 0.0, 0.0
        net.b.weight[:, 0] = 0.0
    graph = graph_of(net, images(1))
    equal, (pair,) = equalize(graph)
    before, after = graph.by_name()["a"].params, equal.by_name()["a"].params
    order = shuffled(torch.arange(8).view(1, 8, 1, 1)).flatten()
    unread = order[[0, 4]].tolist()  # what the first channel of each group of b reads
    assert torch.equal(before["weight"][[1, *unread]], after["weight"][[1, *unread]])
    assert torch.isfinite(after["weight"]).all()
    assert pair.after < 100


def quantized(graph: Graph, *batches: Tensor) -> FakeQuantModel:
    fake = prepare_graph(graph, lambda node: QConfig())
    calibrate(fake, batches)
    return fake


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    noise = (reference - other).detach().double().square().mean()
    return float(10 * torch.log10(reference.detach().double().square().mean() / noise))


def planted() -> nn.Module:
    """conv, depthwise, conv, linear, whose channels differ by a factor of 100 without changing the function."""
    torch.manual_seed(3)

    def body(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.wide(F.relu(s.stem(x))))
        return s.head(F.adaptive_avg_pool2d(F.relu(s.point(x)), 2).flatten(1))

    net = model(
        body, stem=conv(3, 16, 3), wide=conv(16, 16, 3, groups=16), point=conv(16, 16, 1), head=nn.Linear(64, 10)
    )
    unit = torch.logspace(-1, 1, 16)[torch.randperm(16)]
    with torch.no_grad():
        for first, second in (("stem", "wide"), ("wide", "point")):
            made, read = net.get_submodule(first), net.get_submodule(second)
            made.weight.mul_(unit.view(-1, 1, 1, 1))
            made.bias.mul_(unit)
            read.weight.div_(unit.view(-1, 1, 1, 1) if read.groups > 1 else unit.view(1, -1, 1, 1))
    return net


def test_int8_recovers_on_a_net_of_unequal_channels_and_stays_exact() -> None:
    net, x, held_out = planted(), images(64), images(16, seed=9)
    graph = fuse_fx(net, (x[:1],))
    equal, pairs = equalize(graph)
    assert [pair.producer for pair in pairs] == ["stem", "wide", "point"]
    with torch.no_grad():
        wanted = net(held_out)
        plain, cured = quantized(graph, x), quantized(equal, x)
        worse, better = sqnr_db(wanted, plain(held_out)), sqnr_db(wanted, cured(held_out))
        assert better > worse + 10, (worse, better)
        integers = convert_fx(cured)(held_out)
    assert sqnr_db(cured(held_out), integers) > better


def test_pairs_say_what_they_did() -> None:
    pair = equalize(fuse_fx(planted(), (images(1),)))[1][0]
    assert isinstance(pair, Pair)
    assert pair.readers == ("wide",)
    assert pair.before > 50
