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
from qatlib.graph.unsupported import nearest
from tests.models import images, model


def refused(net: nn.Module, *inputs: Tensor, **options: Any) -> GraphError:
    with pytest.raises(GraphError) as caught:
        fuse_fx(net, inputs or (images(2),), **options)
    return caught.value


def test_every_unsupported_operator_is_named_at_once() -> None:
    net = model(
        lambda s, x: s.act(s.norm(s.conv(x))) * torch.sigmoid(x).softmax(1),
        conv=nn.Conv2d(3, 3, 1), norm=nn.GroupNorm(1, 3), act=nn.GELU(),
    )  # fmt: skip
    error = refused(net)
    assert error.code == "QAT132"
    assert "5 operators" in error.seen
    for part in (
        "norm (normalization.GroupNorm) at test_trace_errors.py:",
        "act (activation.GELU)",
        "sigmoid (torch.sigmoid",
        "softmax (torch.Tensor.softmax)",
        "mul (operator.mul)",
        "nn.BatchNorm2d",
        "nn.ReLU or nn.ReLU6",
    ):
        assert part in error.seen
    assert "conv (" not in error.seen, "what is supported is not listed"


def test_an_error_that_follows_from_a_missing_operator_does_not_hide_it() -> None:
    error = refused(model(lambda s, x: torch.cat(x.chunk(3, 1), 1).tanh()))
    assert error.code == "QAT132"
    assert "chunk" in error.seen
    assert "tanh" in error.seen


@pytest.mark.parametrize("call", [torch.special.expit, lambda x: torch.einsum("nchw->ncwh", x), torch.linalg.det])
def test_functions_of_torch_are_never_taken_for_wrapped_ones(call: Callable[[Tensor], Tensor]) -> None:
    assert refused(model(lambda s, x: call(x))).code == "QAT132"


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
    "reflect": (model(lambda s, x: s.c(x), c=nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), "reflect"),
    "constant": (model(lambda s, x: x + 1), "constant"),
    "parameter": (model(lambda s, x: x + s.p, p=nn.Parameter(torch.zeros(3, 1, 1))), "constant"),
    "alpha": (model(lambda s, x: torch.add(x, F.relu(x), alpha=2)), "alpha"),
    "batch axis": (model(lambda s, x: torch.cat([x, x])), "batch axis"),
    "dropout": (model(lambda s, x: F.dropout(x, 0.5)), "dropout"),
    "no statistics": (
        model(lambda s, x: s.b(x), b=nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))),
        "statistics",
    ),
    "uneven adaptive max": (model(lambda s, x: s.p(x), p=nn.AdaptiveMaxPool2d(5)), "unequal"),
}


@pytest.mark.parametrize(("net", "seen"), VARIANTS.values(), ids=VARIANTS.keys())
def test_unsupported_variants(net: nn.Module, seen: str) -> None:
    error = refused(net)
    assert error.code == "QAT134"
    assert seen in error.seen
    assert "test_trace_errors.py:" in error.where


def test_weights_computed_in_the_model() -> None:
    net = model(lambda s, x: F.conv2d(x, F.relu(s.w)), w=nn.Parameter(torch.randn(3, 3, 1, 1)))
    assert refused(net).code == "QAT134"


def test_indices_of_max_pool() -> None:
    error = refused(model(lambda s, x: F.max_pool2d(x, 2, return_indices=True)[0]))
    assert error.code in ("QAT132", "QAT134")
    assert "max_pool2d" in str(error)


def test_batch_norm_that_nothing_absorbs_needs_spatial_axes() -> None:
    error = refused(model(lambda s, x: s.b(x), b=nn.BatchNorm1d(6)), torch.randn(2, 6))
    assert error.code == "QAT134"
    assert "nn.Linear" in error.fix


def test_an_unknown_leaf() -> None:
    error = refused(model(lambda s, x: x), leaf=["head"])
    assert error.code == "QAT135"
    assert "'head'" in error.where


@pytest.mark.parametrize("value", [3, None, torch.ones(2)], ids=["int", "None", "constant"])
def test_outputs_have_to_be_computed(value: object) -> None:
    assert refused(model(lambda s, x: (F.relu(x), value))).code == "QAT136"


def _add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _body(change: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.conv(x)
        return change(s, y) + y

    return body


@pytest.mark.parametrize(
    "change",
    [
        lambda s, y: F.relu_(y),
        lambda s, y: s.relu(y),
        lambda s, y: y.clamp_(-0.1, 0.1),
        lambda s, y: _add_in_place(y, s.conv2(y)),
    ],
    ids=["relu_", "nn.ReLU(inplace=True)", "clamp_", "+="],
)
def test_in_place_changes_that_another_reader_sees(change: Callable[[nn.Module, Tensor], Tensor]) -> None:
    parts = {"conv": nn.Conv2d(3, 3, 1), "conv2": nn.Conv2d(3, 3, 1), "relu": nn.ReLU(inplace=True)}
    error = refused(model(_body(change), **parts))
    assert error.code == "QAT137"
    assert "in-place" in error.fix


def test_a_convolution_whose_inner_method_differs_is_noticed() -> None:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    assert refused(model(lambda s, x: s.c(x), c=Standardized(3, 3, 3))).code == "QAT137"
