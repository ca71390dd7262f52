"""In-place changes: of views, of what has views, of elements; in float, and as integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import GraphError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import fuse_fx, prepare_qat_fx
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.graph.same import evaluate_graph
from tests.models import model
from tests.onnx_runtime import assert_same_in_onnx

Body = Callable[[Any, Tensor], Any]
WIDE = QConfig(activation=FakeQuantSpec(dtype="int16", method="min_max"))


def _one_column(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, 0] += 1
    return y


def _two_axes(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, 1:3, :4] *= y[:, 1:3, 4:]
    return y


def _every_other(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, ::2] -= 0.5
    y[:, :, 1::3] = x[:, :1, 1::3]
    return y


def _flat_view(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y.view(-1).mul_(2)
    y.view(x.size(0), -1)[:, 3:9].relu_()
    return y


def _transposed(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    F.relu(y.transpose(1, 2)[:, 1], inplace=True)
    return y


def _assigned_slice(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, :2] = x[:, 2:4] * 3
    return y


def _assigned_numbers(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, -1, 2:5] = 0.25
    y[..., [0, 3]] = 0
    y[:, 1].zero_()
    y[:, 2, 0].fill_(-1.5)
    return y


def _broadcast(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, :, 2:4] = x.mean(2, keepdim=True)
    y[:, 3] = torch.arange(8.0) / 8
    return y


def _copied(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, 1].copy_(x[:, 0])
    return y + torch.zeros_like(x).copy_(x)


def _filled_by_parts(s: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), 4, 8)
    for k in range(0, 4, 2):
        out[:, k] = s.c(x)[:, k]
    out[:, 1:2] += x[:, :1]
    return out * 2


def _filled_whole(s: Any, x: Tensor) -> Tensor:
    out = x.new_empty(x.size(0), 2, 8)
    out[:, 0], out[:, 1] = x[:, 1], s.c(x)[:, 0]
    return out


def _masked(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[x > 0.5] = -1
    y[x[:, :, 0] < 0] = 0.5
    y[:, s.table[0, :, 0] > 0] = 2.0
    return y


def _base_changes_its_views(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    first, flat = y[:, 0], y.flatten(1)
    kept = y.clone()
    y.add_(1)
    return torch.cat([first, flat, kept.flatten(1)], 1)


def _views_of_each_other(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    a, b = y[:, :3], y[:, 1:]
    a.mul_(-2)
    return torch.cat([a, b, y], 1)


def _parts(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    a, b = y.chunk(2, 1)
    a += b
    b.clamp_(-0.1, 0.1)
    return torch.cat([y, b, a], 1)


def _an_identity_is_the_same_tensor(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    z = y.contiguous().detach()
    z.mul_(3)
    return y + 1


def _a_copy_is_another_tensor(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    z = y.transpose(1, 2).contiguous()
    z.mul_(3)
    w = y.clone()
    w[:, 0] = 0
    return y + z.sum((1, 2), keepdim=True) * 0.1 + w


def _constant_table(s: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(4, 8)
    row = mask[1]
    mask[0] = -3
    row += 2
    mask[:, 1:3].mul_(0.5)
    return s.c(x) + mask


def _loop(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    for k in range(1, 4):
        y[:, k] = y[:, k] + y[:, k - 1] * 0.5
    return y


def _out(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    z = s.c(y)
    torch.add(x, y, out=z)
    return z * y


BODIES: list[Body] = [
    _one_column, _two_axes, _every_other, _flat_view, _transposed, _assigned_slice, _assigned_numbers, _broadcast,
    _copied, _filled_by_parts, _filled_whole, _masked, _base_changes_its_views, _views_of_each_other, _parts,
    _an_identity_is_the_same_tensor, _a_copy_is_another_tensor, _constant_table, _loop, _out,
]  # fmt: skip
EVERY = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.strip("_"))


def net(body: Body) -> nn.Module:
    torch.manual_seed(0)
    return model(body, c=nn.Conv1d(4, 4, 1), table=nn.Buffer(torch.randn(1, 4, 8)))  # type: ignore[arg-type]


@EVERY
def test_the_graph_computes_what_the_model_does(body: Body) -> None:
    source = net(body)
    graph = fuse_fx(source, (torch.randn(1, 4, 8),))
    x = torch.randn(5, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(evaluate_graph(graph, [x])[0], source(x.clone()), rtol=1e-5, atol=1e-6)


@EVERY
def test_so_do_the_integers(body: Body) -> None:
    source, x = net(body), torch.randn(5, 4, 8)
    fake = prepare_qat_fx(source, {"": WIDE}, example_inputs=(x[:2],))
    calibrate(fake, [([x], None)])
    with torch.no_grad():
        wanted = source(x.clone())
    program = to_program(fake)
    (got,) = emulate(program, x)
    assert float((got - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    assert_same_in_onnx(program, x)


# -- what is refused --------------------------------------------------------------------------------------------------


def _part_of_the_batch(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[0] = 0
    return y


def _tensor_under_a_mask(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[x > 0] = s.table[0, 0, :1]
    return y


def _computed_positions(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, x[:, 0].argmax(-1)] = 1
    return y


def _list_of_positions(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    y[:, [0, 2]] = x[:, :2]
    return y


def _view_of_a_constant(s: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), 4, 8)
    out[:, 0].add_(x[:, 0])
    return out


def _own_buffer(s: Any, x: Tensor) -> Tensor:
    s.table.mul_(0.5)
    return x + s.table


def _number(s: Any, x: Tensor) -> Tensor:
    return x / x.abs().max().item()


@pytest.mark.parametrize(
    ("body", "code", "seen"),
    [
        (_part_of_the_batch, "QAT134", "batch axis"),
        (_tensor_under_a_mask, "QAT134", "under a mask"),
        (_computed_positions, "QAT134", "positions computed from the input"),
        (_list_of_positions, "QAT134", "list of positions"),
        (_view_of_a_constant, "QAT137", "of which another tensor, read later, is part"),
        (_own_buffer, "QAT133", r"changed in place at test_in_place.py:\d+"),
        (_number, "QAT130", r"item\(\)"),
    ],
)
def test_what_has_no_form_is_named_with_its_line(body: Body, code: str, seen: str) -> None:
    with pytest.raises(GraphError, match=seen) as caught:
        fuse_fx(net(body), (torch.randn(1, 4, 8),))
    assert caught.value.code == code
    assert "test_in_place.py:" in str(caught.value)


def changes_its_argument(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x * 2


def test_a_wrapped_function_that_changes_what_is_read_again() -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        return changes_its_argument(y) + y

    with pytest.raises(GraphError, match=r"QAT137.*kept whole but changes its argument"):
        fuse_fx(net(body), (torch.randn(1, 4, 8),), wrap=[changes_its_argument])
