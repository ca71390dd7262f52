"""What cannot be traced, and what the user is told about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import GraphError
from qatlib.fake.prepare import fuse_fx
from qatlib.graph.trace import trace
from qatlib.graph.unsupported import nearest
from tests.models import images, model


def refused(net: nn.Module, *inputs: Tensor, **options: Any) -> GraphError:
    with pytest.raises(GraphError) as caught:
        fuse_fx(net, inputs or (images(2),), **options)
    return caught.value


def test_every_unsupported_operator_is_named_at_once() -> None:
    net = model(
        lambda s, x: (s.pool(s.norm(s.conv(x))), torch.lgamma(x).cumsum(1)),
        conv=nn.Conv2d(3, 3, 1), norm=nn.LocalResponseNorm(2), pool=nn.FractionalMaxPool2d(2, 3),
    )  # fmt: skip
    error = refused(net)
    assert error.code == "QAT132"
    assert "4 operators" in error.seen
    for part in (
        "norm (normalization.LocalResponseNorm) at test_trace_errors.py:",
        "pool (pooling.FractionalMaxPool2d)",
        "lgamma (torch.lgamma",
        "cumsum (torch.Tensor.cumsum)",
        "nn.BatchNorm2d",
        "nn.MaxPool2d",
    ):
        assert part in error.seen
    assert "conv (" not in error.seen, "what is supported is not listed"


def test_an_error_that_follows_from_a_missing_operator_does_not_hide_it() -> None:
    error = refused(model(lambda s, x: torch.cat(torch.frexp(x), 0).lgamma()))
    assert error.code == "QAT132"
    assert "frexp" in error.seen
    assert "lgamma" in error.seen


@pytest.mark.parametrize("call", [torch.special.i0, torch.cummax, torch.linalg.det])
def test_functions_of_torch_are_never_taken_for_wrapped_ones(call: Callable[..., Any]) -> None:
    assert refused(model(lambda s, x: call(x, 1)[0] if call is torch.cummax else call(x))).code == "QAT132"


@pytest.mark.parametrize("name", ["activation.Softmax", "activation.MultiheadAttention", "activation.LogSoftmax"])
def test_no_relu_is_proposed_for_what_is_no_activation(name: str) -> None:
    assert "ReLU" not in nearest(f"torch.nn.modules.{name}")


def test_control_flow_on_values_names_the_line() -> None:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return F.relu(x)

    error = refused(model(body))
    assert error.code == "QAT130"
    assert error.where.endswith(f"test_trace_errors.py:{body.__code__.co_firstlineno + 1}")
    assert "`if x.sum() > 0:`" in error.seen


def test_a_wrong_shape_names_the_line() -> None:
    error = refused(model(lambda s, x: s.conv(x), conv=nn.Conv2d(4, 4, 1)))
    assert error.code == "QAT131"
    assert error.where.startswith("test_trace_errors.py:")


def test_too_many_inputs() -> None:
    assert refused(model(lambda s, x: x), images(), images()).code == "QAT131"


VARIANTS: dict[str, tuple[nn.Module, str]] = {
    "batch axis": (model(lambda s, x: torch.cat([x, x])), "batch axis"),
    "dropout": (model(lambda s, x: F.dropout(x, 0.5)), "dropout"),
    "no statistics": (
        model(lambda s, x: s.b(x), b=nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))),
        "statistics",
    ),
}


@pytest.mark.parametrize(("net", "seen"), VARIANTS.values(), ids=VARIANTS.keys())
def test_unsupported_variants(net: nn.Module, seen: str) -> None:
    error = refused(net)
    assert error.code == "QAT134"
    assert seen in error.seen
    assert "test_trace_errors.py:" in error.where


def test_weights_computed_from_the_input() -> None:
    net = model(
        lambda s, x: F.conv2d(x, s.c(x)[0, 0, 0, 0] * s.w), c=nn.Conv2d(3, 3, 1), w=nn.Parameter(torch.ones(3, 3, 1, 1))
    )
    assert refused(net).code in ("QAT132", "QAT134")


def test_indices_of_max_pool() -> None:
    error = refused(model(lambda s, x: F.max_pool2d(x, 2, return_indices=True)[0]))
    assert error.code in ("QAT132", "QAT134")
    assert "max_pool2d" in str(error)


def test_an_unknown_leaf() -> None:
    error = refused(model(lambda s, x: x), leaf=["head"])
    assert error.code == "QAT135"
    assert "'head'" in error.where


def _private(x: Tensor) -> Tensor:
    return x


def test_a_wrapped_function_that_torch_would_not_wrap() -> None:
    error = refused(model(lambda s, x: _private(x)), wrap=[_private])
    assert error.code == "QAT135"
    assert "'_private'" in error.where


@pytest.mark.parametrize("value", [3, None, torch.ones(2)], ids=["int", "None", "constant"])
def test_outputs_have_to_be_computed(value: object) -> None:
    assert refused(model(lambda s, x: (F.relu(x), value))).code == "QAT136"


def test_a_convolution_whose_inner_method_differs_is_noticed() -> None:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    assert refused(model(lambda s, x: s.c(x), c=Standardized(3, 3, 3))).code == "QAT137"


class Counting(nn.Module):
    """A step that remembers: in a buffer, or in a plain attribute."""

    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.linear, self.attribute = nn.Linear(4, 4), attribute
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.attribute:
            self.seen = torch.tanh(y)
        else:
            self.state = self.state + 1
        return y + self.state


@pytest.mark.parametrize(("attribute", "name"), [(True, "seen"), (False, "state")])
def test_state_kept_in_the_model_is_named_and_the_model_left_as_it_was(attribute: bool, name: str) -> None:
    net = Counting(attribute).train()
    before = dict(vars(net)), dict(net._buffers)
    with pytest.raises(GraphError, match=f"QAT133 {name}: is assigned in forward"):
        trace(net, [torch.randn(1, 4)])
    assert (dict(vars(net)), dict(net._buffers)) == before
    assert net.training


def test_an_integer_output_that_the_graph_computes_wrongly_is_found() -> None:
    with pytest.raises(GraphError, match="QAT137"):
        fuse_fx(model(lambda s, x: (x * x.size(0)).argmax(-1)), [torch.randn(4, 30)])


def test_samples_that_attend_to_each_other_are_named() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 12).eval()  # batch_first=False
    with pytest.raises(GraphError, match=r"QAT136 layer\.self_attn\.qk .*one sample depends on the others"):
        trace(model(lambda s, x: s.layer(x), layer=layer), [torch.randn(7, 2, 6)])
