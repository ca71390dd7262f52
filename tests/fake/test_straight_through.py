"""Rounding piece by piece equals, bit for bit, the formula in whole tensors: results, gradients, layouts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.fake import straight_through
from qatlib.fake.fake_quant import fake_quantize
from qatlib.graph.ir import Node
from tests.models import calibrated, everything, images, model

BOUNDS = [None, (0, None), (0, 6), (-1.5, None), (None, 0.1), (0.3, 0.7)]
LAYOUTS = ["contiguous", "channels last", "transposed", "every other"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight_through, "_PIECE", 50)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    return torch.stack([x, x], -1)[..., 0] if layout == "every other" else x


def whole(x: Tensor, scale: Tensor, qmin: int, qmax: int, bounds: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Result and gradient by torch's own clamp, and a mask over all elements."""
    leaf = x.detach().clone().requires_grad_()
    y = leaf if bounds is None else F.relu(leaf) if bounds == (0, None) else leaf.clamp(*bounds)
    codes = (y.detach() / scale).round()
    y.backward(upstream * ((codes >= qmin) & (codes <= qmax)))
    assert leaf.grad is not None
    return codes.clamp(qmin, qmax) * scale, leaf.grad


def samples(dtype: torch.dtype = torch.float32) -> Tensor:
    """``[6, 5, 4, 3]``: random, with halves of the scale 1/16, zeros of both signs, and the ends of :data:`BOUNDS`."""
    x = torch.randn(360, generator=torch.Generator().manual_seed(0)) * 6
    x[:120] = (torch.arange(120) - 60 + 0.5) / 16
    x[120:132] = torch.tensor([0.0, -0.0, 6.0, -1.5, 0.1, 0.3, 0.7, 127 / 16, 127.5 / 16, -8.03125, -128.5 / 16, 1e30])
    return x[torch.randperm(360, generator=torch.Generator().manual_seed(1))].view(6, 5, 4, 3).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "channels", "bfloat16", "float64", "int16"])
def test_equals_the_formula_in_whole_tensors(kind: str, bounds: Any, layout: str) -> None:
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(kind, torch.float32)
    x = laid_out(samples(dtype), layout).detach().requires_grad_()
    scale = torch.linspace(0.02, 0.0625, 6).view(6, 1, 1, 1) if kind == "channels" else torch.tensor(0.0625)
    code, ends = ("int16", (-32768, 32767)) if kind == "int16" else ("int8", (-128, 127))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted, gradient = whole(x, scale, *ends, bounds, upstream)
    out = fake_quantize(x, scale, code, bounds)
    assert torch.equal(out, wanted)
    out.backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, gradient)
    with torch.no_grad():
        reused = laid_out(x.clone(), layout)
        assert fake_quantize(reused, scale, code, bounds, reuse=True).data_ptr() == reused.data_ptr()
        assert torch.equal(reused, wanted)


def test_a_gradient_of_another_layout() -> None:
    x = samples().to(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(x.shape)
    fake_quantize(x, torch.tensor(0.0625), "int8", (0, 6)).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, whole(x, torch.tensor(0.0625), -128, 127, (0, 6), upstream)[1])


def test_memory_is_not_reused_where_a_gradient_is_wanted() -> None:
    x = (samples() * 1).requires_grad_()
    inner = x * 2
    before = inner.detach().clone()
    fake_quantize(inner, torch.tensor(0.0625), "int8", None, reuse=True)
    assert torch.equal(inner, before)


def test_the_scale_may_move_before_the_gradient_is_taken() -> None:
    x, scale, upstream = samples().requires_grad_(), torch.tensor(0.0625), torch.randn(6, 5, 4, 3)
    out = fake_quantize(x, scale, "int8")
    wanted = whole(x, scale.clone(), -128, 127, None, upstream)[1]
    scale.mul_(0.01)
    out.backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


def test_a_gradient_can_be_differentiated_again() -> None:
    x = samples().requires_grad_()
    out = fake_quantize(x * 1, torch.tensor(0.0625), "int8", (0, 6)).square().sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = whole(x, torch.tensor(0.0625), -128, 127, (0, 6), torch.ones_like(x))[1]
    assert torch.equal(second, 2 * inside), "the square's slope of 2, twice through the gate of ones and zeros"


def test_empty_tensors() -> None:
    x = torch.empty(0, 3, 2, 2, requires_grad=True)
    fake_quantize(x, torch.tensor(0.1), "int8", (0, 6)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


class Reads(nn.Module):
    """What a reader of memory in place could spoil: the input, both branches of an add, a product with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.a(x))
        z = F.relu(self.b(y) + y)
        return z * z + y.clamp(0.1, 2.0) + (x + 0.0).mean(1, keepdim=True)


@pytest.mark.parametrize("net", [Reads, everything])
def test_evaluation_in_place_equals_training_form(net: Any) -> None:
    """With gradients nothing is written in place; without, every value is the same, and the user's input too."""
    x = images(4)
    quantized = calibrated(net().eval(), x)
    given, seen = x.clone(), dict[str, Tensor]()

    def keep(node: Node, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        assert all(torch.equal(i, seen.get(n, x)) for i, n in zip(inputs, node.inputs, strict=True))
        seen[node.name] = out.detach().clone()

    with torch.no_grad():
        quantized.walk(given, visit=keep)
    assert torch.equal(given, x)
    quantized.walk(x, visit=lambda node, _, out: torch.testing.assert_close(out, seen[node.name], rtol=0, atol=0))


def test_a_clamp_alone_passes_gradients_as_torch_does() -> None:
    """The relu of a fused conv: below 0 nothing passes, whatever the code."""
    net = calibrated(model(lambda s, x: F.relu(s.c(x)).flatten(1), c=nn.Conv2d(3, 4, 1)), images(4))
    float_net = copy.deepcopy(net)
    x = images(4).requires_grad_()
    net(x).sum().backward()
    op = float_net.op("c")
    params = op.quantized_params()
    leaf = x.detach().clone().requires_grad_()
    scale = net.qtype("x.quant").scale
    pre = F.conv2d(fake_quantize(leaf, torch.tensor(scale), "int8"), params["weight"], params["bias"])
    out_scale = torch.tensor(net.qtype("c").scale)
    codes = (F.relu(pre.detach()) / out_scale).round()
    F.relu(pre).backward((codes <= 127).float())
    assert torch.equal(x.grad, leaf.grad)  # type: ignore[arg-type]
