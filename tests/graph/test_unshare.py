"""Counting calls, and a copy of a module for each: the same bits, weights tied or not, names of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qatlib import calibrate, convert_fx, get_module_called_count, prepare_qat_fx, unshare
from qatlib.errors import GraphError
from qatlib.graph.unshare import CallsInTurn
from tests.models import images, lively, model


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.act(x)))) * 2


def shared() -> nn.Module:
    """head, twice; its act, four times; a convolution that is called once; a dropout that is not called."""
    torch.manual_seed(0)
    net = model(lambda s, x: s.head(s.one(x)) + s.head(x * 8), head=Head(), one=nn.Conv2d(3, 3, 1), spare=nn.Dropout())
    return lively(net)


X = images(2, 3, 8)


def test_calls_are_counted_and_the_model_is_left_as_it_was() -> None:
    net = shared().train()
    mean = net.head.norm.running_mean.clone()
    counts = get_module_called_count(net, [X])
    assert counts == {"head": 2, "head.conv": 2, "head.norm": 2, "head.act": 4, "one": 1, "spare": 0}
    assert net.training
    assert torch.equal(net.head.norm.running_mean, mean)
    assert not net.head._forward_pre_hooks


def test_a_model_that_fails_leaves_no_hooks() -> None:
    net = shared()
    with pytest.raises(RuntimeError):
        get_module_called_count(net, [images(2, 5, 8)])
    assert not net.head._forward_pre_hooks


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_the_same_bits_in_eval_and_in_training(tied: bool, train: bool) -> None:
    net = shared().train(train)
    apart = unshare(net, [X], tied=tied)
    assert apart.training == train
    if tied or not train:  # in training, batch norms that are not tied have statistics of their own
        for _ in range(2):
            assert torch.equal(apart(X), net(X))
        assert torch.equal(apart.head.norm.running_mean, net.head.norm.running_mean)


def test_each_call_has_a_module_and_nothing_is_shared_any_more() -> None:
    net = shared()
    apart = unshare(net, [X])
    counts = get_module_called_count(apart, [X])
    assert max(count for name, count in counts.items() if not isinstance(apart.get_submodule(name), CallsInTurn)) == 1
    assert counts["head.0.conv"] == counts["head.1.conv"] == counts["head.1.act.1"] == 1
    assert not isinstance(net.head, CallsInTurn), "the model itself is not changed"
    assert apart.head.conv.in_channels == 3, "attributes of the module are still there"


@pytest.mark.parametrize("tied", [True, False])
def test_training_keeps_tied_weights_tied(tied: bool) -> None:
    net = unshare(shared().train(), [X], tied=tied)
    net = copy.deepcopy(net).to(torch.float64).to(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    first, second = net.get_submodule("head.0"), net.get_submodule("head.1")
    assert (first.conv.weight is second.conv.weight) == tied
    assert torch.equal(first.conv.weight, second.conv.weight) == tied
    assert torch.equal(first.norm.running_mean, second.norm.running_mean) == tied
    alone = shared().train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        alone(X).square().mean().backward()
        optimizer.step()
    assert torch.equal(alone.head.conv.weight, first.conv.weight) == tied, "as the model that shares it"


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_every_call_has_a_name_a_scale_and_the_weights_that_it_should(tied: bool) -> None:
    fakes = [prepare_qat_fx(net, example_inputs=[X]) for net in (shared(), unshare(shared(), [X], tied=tied))]
    for fake in fakes:
        calibrate(fake, [X])
    together, apart = fakes
    assert (apart.op("head.0.conv").weight is apart.op("head.1.conv").weight) == tied
    scales = [float(apart.qtype(f"head.{k}.conv").scale or 0) for k in range(2)]
    assert scales == [together.qtype(name).scale for name in ("head.conv", "head.conv#1")]
    assert scales[0] != scales[1]
    assert torch.equal(apart(X), together(X))
    assert torch.equal(convert_fx(apart)(X), convert_fx(together)(X))


def test_what_is_named_inside_of_a_copy_is_copied_too() -> None:
    apart = unshare(shared(), [X], ["head.act", "head"])
    counts = get_module_called_count(apart, [X])
    assert counts["head.0.act.0"] == counts["head.1.act.1"] == 1
    only = unshare(shared(), [X], ["head"])
    assert get_module_called_count(only, [X])["head.0.act"] == 2
    assert torch.equal(apart(X), only(X))


def test_only_what_is_named() -> None:
    apart = unshare(shared(), [X], ["head.conv"])
    assert get_module_called_count(apart, [X])["head"] == 2
    assert isinstance(apart.head.conv, CallsInTurn)
    assert torch.equal(apart(X), shared()(X))


@pytest.mark.parametrize("name", ["one", "spare", "nothing"])
def test_a_module_that_is_not_shared_is_refused(name: str) -> None:
    with pytest.raises(GraphError, match=rf"QAT206 {name}: .*head, head\.conv"):
        unshare(shared(), [X], [name])


def test_a_module_of_two_names_is_replaced_under_both() -> None:
    conv = nn.Conv2d(3, 3, 1)
    net = model(lambda s, x: s.b(s.a(x)), a=conv, b=conv)
    apart = unshare(net, [X])
    assert apart.a is apart.b
    assert torch.equal(apart(X), net(X))


class Repeats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1]):
            x = self.c(x)
        if x.shape[0] == 5:
            raise ValueError("five")
        return x


def test_another_number_of_calls_is_refused_and_a_failure_leaves_no_trace() -> None:
    net = Repeats()
    apart = unshare(net, [torch.ones(1, 2, 4)])
    with pytest.raises(GraphError, match="QAT208 c: was called 4 times and has 2 copies"):
        apart(torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="five"):
        apart(torch.ones(5, 3, 4))
    x = torch.randn(2, 2, 4)
    assert torch.equal(apart(x), net(x))
    assert torch.equal(prepare_qat_fx(apart, example_inputs=[x])(x), net(x))
