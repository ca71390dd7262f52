from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.hard_case import model
from qatlib.conversion import convert_fx
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import fuse_fx, prepare_graph
from qatlib.fake.ptq.equalize import equalize
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.graph.ir import Graph, Node

READ_BY_DEPTHWISE = ["stem.conv", "blocks.0.point.conv", "blocks.1.point.conv"]


def images(count: int, seed: int) -> Tensor:
    """Blurred noise in [-1, 1], of which an average over the image leaves something."""
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=28, mode="bilinear")


def network() -> model.SeparableNet:
    """Untrained, in eval mode, its batch norms with the statistics of some images."""
    torch.manual_seed(0)
    net = model.build()
    assert isinstance(net, model.SeparableNet)
    for layer in net.layers():
        layer.bn.momentum = None  # type: ignore[assignment]
    with torch.no_grad():
        net.train()(images(64, 4))
    return net.eval()


def test_it_is_as_large_as_it_says() -> None:
    assert sum(parameter.numel() for parameter in network().parameters()) == 9_034
    assert network()(images(5, 0)).shape == (5, 10)


def test_unbalancing_keeps_the_function_and_sets_channels_apart() -> None:
    net, x = network().double(), images(4, 1).double()
    with torch.no_grad():
        before, was = net(x), net.stem(x).amax((0, 2, 3))
        model.unbalance(net)
        after, now = net(x), net.stem(x).amax((0, 2, 3))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    apart = now / was
    assert 900 < float(apart.nan_to_num(1).max() / apart.nan_to_num(1).min()) < 1100


def sqnr_db(net: torch.nn.Module, graph: Graph, choose: object) -> float:
    """Of the integers, on images that calibration did not see."""
    fake = prepare_graph(graph, choose)  # type: ignore[arg-type]
    calibrate(fake, images(64, 2).split(32))
    x = images(32, 3)
    with torch.no_grad():
        wanted = net(x)
        error = wanted - convert_fx(fake)(x)
    wanted = wanted - wanted.mean(0)  # what tells images apart
    return float(10 * torch.log10(wanted.square().mean() / error.square().mean()))


def test_int8_loses_it_and_equalization_or_int16_at_the_named_tensors_brings_it_back() -> None:
    net = network()
    balanced = sqnr_db(net, fuse_fx(net, (images(1, 0),)), lambda node: QConfig())
    model.unbalance(net)
    graph = fuse_fx(net, (images(1, 0),))

    def int16(node: Node) -> QConfig:
        wide = node.name in READ_BY_DEPTHWISE
        return QConfig(FakeQuantSpec("int16" if wide else "int8", "min_max" if wide else "percentile"))

    lost = sqnr_db(net, graph, lambda node: QConfig())
    equalized = sqnr_db(net, equalize(graph)[0], lambda node: QConfig())
    wide = sqnr_db(net, graph, int16)
    assert lost < balanced - 6, (lost, balanced)
    assert min(equalized, wide) > balanced - 3, (equalized, wide, balanced)
