"""What a trace holds: operators, attributes, names, shapes; and that it computes what torch computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import GraphError
from qatlib.graph.ir import OPAQUE, Graph
from qatlib.graph.same import evaluate_graph
from qatlib.graph.trace import trace
from tests.models import images, lively, model


def ops(graph: Graph) -> dict[str, str]:
    return {node.name: node.op for node in graph.nodes}


def check(net: nn.Module, *inputs: Tensor) -> Graph:
    """The graph of ``net``; its result equals torch's for the example and for another batch size."""
    graph = trace(net, inputs)
    for batch in (inputs, tuple(torch.cat([x, x, x]) for x in inputs)):
        with torch.no_grad():
            (got,) = evaluate_graph(graph, batch)
            torch.testing.assert_close(got, net(*batch), rtol=1e-5, atol=1e-6)
    return graph


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(0, 1)),
    "dilated": nn.Conv2d(4, 6, (3, 2), dilation=(2, 3)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "same, even kernel": nn.Conv2d(4, 6, (2, 4), padding="same"),
    "same, even and dilated": nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
}


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution(conv: nn.Conv2d) -> None:
    graph = check(model(lambda s, x: s.conv(x), conv=conv), images(2, 4, 9))
    assert ops(graph) == {"x": "input", "conv": "conv"}


@pytest.mark.parametrize(
    ("conv", "shape"), [(nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11)), (nn.Conv3d(4, 6, (1, 2, 3)), (2, 4, 3, 5, 6))]
)
def test_one_and_three_axes(conv: nn.Module, shape: tuple[int, ...]) -> None:
    graph = check(model(lambda s, x: F.relu(s.conv(x)), conv=conv), torch.randn(shape))
    assert len(graph.by_name()["conv"].attrs["stride"]) == len(shape) - 2


WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": nn.MaxPool2d(2),
    "max, ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "max, ceil, last window dropped": nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    "max, dilated": nn.MaxPool2d(2, 1, 1, dilation=2),
    "max, functional": lambda x: F.max_pool2d(x, 3, stride=2),
    "max, torch": lambda x: torch.max_pool2d(x, 3, 2),
    "max, adaptive": nn.AdaptiveMaxPool2d((5, 2)),
    "max, adaptive, uneven": nn.AdaptiveMaxPool2d((3, 7)),
    "max, adaptive, functional": lambda x: F.adaptive_max_pool2d(x, (3, None)),
    "mean": nn.AvgPool2d(3, 2, 1),
    "mean, padding not counted": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "mean, ceil": nn.AvgPool2d(3, 2, ceil_mode=True),
    "mean, ceil and padding": nn.AvgPool2d((3, 4), 3, 1, ceil_mode=True),
    "mean, ceil, padding not counted": nn.AvgPool2d(4, 3, 1, ceil_mode=True, count_include_pad=False),
    "mean, own divisor": nn.AvgPool2d(3, 1, divisor_override=7),
    "mean, functional": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "mean, functional, padding": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive, even": nn.AdaptiveAvgPool2d((5, 2)),
    "adaptive, uneven": nn.AdaptiveAvgPool2d((3, 7)),
    "adaptive, one axis kept": nn.AdaptiveAvgPool2d((None, 1)),
    "adaptive, more out than in": nn.AdaptiveAvgPool2d(13),
    "adaptive, functional": lambda x: F.adaptive_avg_pool2d(x, 1),
}


@pytest.mark.parametrize("pool", WINDOWS.values(), ids=WINDOWS.keys())
def test_pool(pool: Callable[[Tensor], Tensor]) -> None:
    parts = {"pool": pool} if isinstance(pool, nn.Module) else {}
    net = model((lambda s, x: s.pool(x)) if parts else (lambda s, x: pool(x)), **parts)
    graph = check(net, images(2, 4, 10))
    assert {"max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool"} & set(ops(graph).values())


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "keyword": lambda x: torch.flatten(input=x, start_dim=1),
    "method": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "shape": lambda x: x.reshape(x.shape[0], 4, -1),
    "arithmetic on sizes": lambda x: x.view(x.size(0), x.size(1) * x.size(2), x.size(3)),
    "batch folded into another axis": lambda x: x.reshape(x.shape[0] * 4, 6, 6),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "torch.permute": lambda x: torch.permute(x, (0, 3, 1, 2)),
}


@pytest.mark.parametrize("body", SHAPES.values(), ids=SHAPES.keys())
def test_shape(body: Callable[[Tensor], Tensor]) -> None:
    check(model(lambda s, x: body(x)), images(2, 4, 6))


def test_unpacked_shape_does_not_fix_the_batch() -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c, h * w)

    graph = check(model(body), images(2, 4, 6))
    assert graph.by_name()["reshape"].shape == (-1, 4, 36)


CLAMPS: dict[str, tuple[Callable[[Tensor], Tensor], list[float | None]]] = {
    "F.relu": (F.relu, [0, None]),
    "torch.relu": (torch.relu, [0, None]),
    "method": (lambda x: x.relu(), [0, None]),
    "in place": (lambda x: F.relu(x, inplace=True), [0, None]),
    "F.relu_": (F.relu_, [0, None]),
    "relu6": (F.relu6, [0, 6]),
    "relu6 in place": (lambda x: F.relu6(x, True), [0, 6]),
    "hardtanh": (F.hardtanh, [-1, 1]),
    "hardtanh, bounds": (lambda x: F.hardtanh(x, -0.5, max_val=2.0), [-0.5, 2]),
    "clamp": (lambda x: torch.clamp(x, -1, 0.5), [-1, 0.5]),
    "clamp, one side": (lambda x: x.clamp(max=0.25), [None, 0.25]),
}


@pytest.mark.parametrize(("body", "bounds"), CLAMPS.values(), ids=CLAMPS.keys())
def test_clamp(body: Callable[[Tensor], Tensor], bounds: list[float | None]) -> None:
    graph = check(model(lambda s, x: body(x.clone())), images(2, 2, 4) * 4)
    assert next(node for node in graph.nodes if node.op == "clamp").attrs["clamp"] == bounds


def test_functional_forms_take_parameters_of_the_model() -> None:
    weight, bias = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(6))
    dense = nn.Parameter(torch.randn(5, 6 * 36))

    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = F.conv2d(x, s.weight, s.bias, padding=1, groups=2)
        return F.linear(torch.add(y, F.relu(y)).flatten(1), s.dense)

    graph = check(model(body, weight=weight, bias=bias, dense=dense), images(2, 4, 6))
    assert list(ops(graph).values()) == ["input", "conv", "clamp", "add", "reshape", "linear"]
    assert graph.by_name()["conv2d"].params["weight"] is weight


@pytest.mark.parametrize(
    "add", [lambda x, y: x + y, torch.add, lambda x, y: x.add(y), lambda x, y: torch.add(input=x, other=y, alpha=1)]
)
def test_add(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = check(model(lambda s, x: add(s.a(x), x), a=nn.Conv2d(4, 4, 1)), images(2, 4, 5))
    assert graph.by_name()["add"].inputs == ("a", "x")


@pytest.mark.parametrize(
    "join", [lambda t: torch.cat(t, 1), lambda t: torch.cat(t, dim=-3), lambda t: torch.concat(t, axis=1)]
)
def test_cat(join: Callable[[list[Tensor]], Tensor]) -> None:
    graph = check(model(lambda s, x: join([x, s.a(x), x]), a=nn.Conv2d(4, 2, 1)), images(2, 4, 5))
    assert graph.nodes[-1].inputs == ("x", "a", "x")
    assert graph.nodes[-1].attrs["axis"] == 1


def test_a_shared_module_is_named_by_its_calls() -> None:
    graph = check(model(lambda s, x: s.conv(F.relu(s.conv(x))), conv=nn.Conv2d(4, 4, 3, padding=1)), images(2, 4, 6))
    nodes = graph.by_name()
    assert list(nodes) == ["x", "conv", "relu", "conv#1"]
    assert nodes["conv#1"].module == "conv"
    assert nodes["conv"].params["weight"] is nodes["conv#1"].params["weight"]


def test_functions_are_named_by_the_module_that_calls_them() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) + x

    graph = check(model(lambda s, x: s.b(s.a(x)), a=Inner(), b=nn.Sequential(Inner())), images(1, 2, 3))
    assert [n.name for n in graph.nodes] == ["x", "a.relu", "a.add", "b.0.relu", "b.0.add"]
    assert graph.by_name()["a.relu"].where.startswith("test_trace.py:")


def test_several_inputs_and_nested_outputs() -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> dict[str, object]:
            return {"sum": left + right, "parts": [F.relu(left), (right,)]}

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    graph = trace(Two(), (x, y))
    assert graph.inputs == ("left", "right")
    nested = graph.structure.unflatten(evaluate_graph(graph, (x, y)))
    assert type(nested) is dict
    assert type(nested["parts"]) is list
    torch.testing.assert_close(nested["sum"], x + y)
    assert nested["parts"][1][0] is y


def test_optional_arguments_keep_their_defaults() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, flag: bool = True) -> Tensor:
            y = F.relu(x) if flag else x
            return y if mask is None else y + mask

    net = Optional()
    assert [n.op for n in trace(net, (torch.randn(2, 3),)).nodes] == ["input", "clamp"]
    assert [n.op for n in trace(net, (torch.randn(2, 3), torch.randn(2, 3))).nodes] == [
        "input",
        "input",
        "clamp",
        "add",
    ]


def test_subclasses_that_inherit_forward_are_their_base() -> None:
    class Named(nn.Conv2d):
        pass

    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, self.weight, self.bias))

    graph = check(model(lambda s, x: s.b(s.a(x)), a=Named(4, 4, 1), b=Own(4, 4, 1)), images(1, 4, 3))
    assert ops(graph) == {"x": "input", "a": "conv", "b.conv2d": "conv", "b.relu": "clamp"}


def odd(x: Tensor) -> Tensor:
    """Control flow on values; traceable only when wrapped."""
    return x if float(x.sum()) > 0 else -x


def test_wrapped_functions_and_leaf_modules_stay_whole() -> None:
    net = model(lambda s, x: s.gelu(odd(s.conv(x))), conv=nn.Conv2d(4, 4, 1), gelu=nn.Sequential(nn.GELU()))
    graph = trace(net, (images(2, 4, 3),), leaf=["gelu"], wrap=[odd])
    assert [n.op for n in graph.nodes] == ["input", "conv", OPAQUE, OPAQUE]
    assert graph.by_name()["odd"].callee is odd
    x = images(3, 4, 3)
    torch.testing.assert_close(evaluate_graph(graph, [x])[0], net(x))


def test_leaf_wins_over_a_known_operator() -> None:
    graph = trace(model(lambda s, x: s.conv(x), conv=nn.Conv2d(4, 4, 1)), (images(1, 4, 3),), leaf=["conv"])
    assert graph.by_name()["conv"].op == OPAQUE


def test_the_model_is_left_as_it_was() -> None:
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()))
    net.train()
    net[2].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = images(2)
    kept = x.clone()
    trace(net, (x,))
    assert [m.training for m in net.modules()] == [True, True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(x, kept)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_convolutions_with_other_padding(mode: str) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode=mode)
    assert ops(check(model(lambda s, x: s.c(x), c=layer), images())) == {"x": "input", "c.pad": "pad", "c": "conv"}


def test_tuples_of_tensors_can_be_looped_over() -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        parts = torch.chunk(s.conv(x), 3, dim=1)
        assert len(parts) == 3
        return torch.cat([part * k for k, part in enumerate(parts, start=1)], 1)

    check(model(body, conv=nn.Conv2d(3, 6, 1)), images())


class _Standardized(nn.Conv2d):
    """Calls the functional form with weights of its own making."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) * 2


def test_subclasses_that_call_the_functional_form_are_quantized_under_their_name() -> None:
    net = model(lambda s, x: s.fc(s.block(x).flatten(1)), block=nn.Sequential(_Standardized(3, 4, 3, padding=1)),
                fc=_Scaled(4 * 256, 5))  # fmt: skip
    found = ops(check(net, images()))
    assert found["block.0.conv2d"] == "conv"
    assert found["fc.linear"] == "linear"


def test_weights_behind_a_parametrization() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert "conv" in ops(check(model(lambda s, x: s.c(x), c=layer), images())).values()


# -- constants, in-place changes, shapes ------------------------------------------------------------------------------


def test_weights_computed_from_parameters_are_constants() -> None:
    net = model(lambda s, x: F.conv2d(x, F.relu(s.w) / s.w.abs().sum()), w=nn.Parameter(torch.randn(3, 3, 1, 1)))
    graph = check(net, images())
    assert ops(graph) == {"x": "input", "conv2d": "conv"}


def test_creation_functions_are_constants_whatever_the_batch() -> None:
    net = model(lambda s, x: F.linear(x, (x.new_ones(x.size(1), 4) * torch.arange(4.0)).T))
    assert ops(check(net, torch.randn(2, 5))) == {"x": "input", "linear": "linear"}


def test_a_constant_that_counts_the_batch_is_refused() -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, s.w * torch.arange(x.size(0)).sum())

    with pytest.raises(GraphError, match=r"QAT136.*batch size"):
        trace(model(body, w=nn.Parameter(torch.ones(2, 2))), (torch.randn(2, 2),))


def _add_in_place(y: Tensor, z: Tensor) -> Tensor:
    y += z
    return y


@pytest.mark.parametrize(
    "change",
    [
        lambda s, y: F.relu_(y),
        lambda s, y: F.relu(y, True),
        lambda s, y: s.relu(y),
        lambda s, y: y.clamp_(-0.1, 0.1),
        lambda s, y: _add_in_place(y, s.conv2(y)),
    ],
    ids=["relu_", "inplace argument", "nn.ReLU(inplace=True)", "clamp_", "+="],
)
def test_in_place_changes_reach_every_holder_of_the_tensor(change: Callable[[nn.Module, Tensor], Tensor]) -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.conv(x)
        held = [y]
        return change(s, y) + held[0]

    parts = {"conv": nn.Conv2d(3, 3, 1), "conv2": nn.Conv2d(3, 3, 1), "relu": nn.ReLU(inplace=True)}
    check(model(body, **parts), images())


def test_an_axis_that_is_a_multiple_of_the_batch() -> None:
    graph = check(model(lambda s, x: s.c(x.reshape(-1, 1, 16, 16)), c=nn.Conv2d(1, 2, 3)), images())
    assert [node.shape for node in graph.nodes] == [(-1, 3, 16, 16), (-3, 1, 16, 16), (-3, 2, 14, 14)]
