from __future__ import annotations

import torch
from torch import fx, nn

from examples.fashion_mnist import model

LAYERS = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Linear,
)


def test_size_and_shapes() -> None:
    net = model.build()
    assert sum(parameter.numel() for parameter in net.parameters()) == 35_898
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_width_and_classes() -> None:
    net = model.build(width=8, classes=4)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 4)
    assert sum(parameter.numel() for parameter in net.parameters()) < 12_000


def test_the_trace_holds_only_plain_layers_and_computes_the_same() -> None:
    torch.manual_seed(0)
    net = model.build().eval()
    traced = fx.symbolic_trace(net)
    called = [type(net.get_submodule(str(node.target))) for node in traced.graph.nodes if node.op == "call_module"]
    assert set(called) == set(LAYERS)
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert [getattr(function, "__name__", "") for function in functions] == ["add", "add", "cat"]
    assert not [node for node in traced.graph.nodes if node.op == "call_method"]
    images = torch.rand(4, 1, 28, 28) * 2 - 1
    assert traced(images).equal(net(images))


def test_no_module_is_called_twice() -> None:
    targets = [node.target for node in fx.symbolic_trace(model.build()).graph.nodes if node.op == "call_module"]
    assert len(targets) == len(set(targets))
