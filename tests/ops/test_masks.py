"""Attention masks, in every way that people write them: hidden keys count for nothing, and cost the others no codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlib.emulator import emulate
from tests.onnx_runtime import assert_same_in_onnx
from tests.ops.reductions import assert_exact, converted, sqnr_db
from tests.oracle import run

generator = torch.Generator().manual_seed(0)
X = torch.randn(4, 10, 16, generator=generator) * 1.5
HIDDEN = torch.rand(4, 10, 10, generator=generator) < 0.4
HIDDEN[..., 0] = False  # no row without a visible key
CAUSAL = torch.ones(10, 10).triu(1).bool()
BIAS = -0.3 * (torch.arange(10)[:, None] - torch.arange(10)).abs().float()
LOWEST = torch.finfo(torch.float32).min
Body = Callable[..., Any]


class Net(nn.Module):
    """``body(net, x @ x^T, mask)`` with the tensors above as buffers."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("causal", CAUSAL)
        self.register_buffer("bias", BIAS)
        self.register_buffer("far", CAUSAL * -1e4)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.body(self, x @ x.transpose(1, 2), mask)


def real(value: float, bias: Tensor | None = None) -> Tensor:
    """A mask of real numbers: 0, or ``bias``, where a key is visible."""
    visible = torch.zeros(4, 10, 10) if bias is None else bias.expand(4, 10, 10)
    return visible.masked_fill(HIDDEN, value)


STYLES: dict[str, tuple[Body, Tensor]] = {
    "fill": (lambda s, a, m: (a / 4).masked_fill(m, -1e9).softmax(-1), HIDDEN),
    "fill with -inf": (lambda s, a, m: (a / 4).masked_fill(m, -math.inf).softmax(-1), HIDDEN),
    "fill with -1e4": (lambda s, a, m: (a / 4).masked_fill(m, -1e4).softmax(-1), HIDDEN),
    "fill with the lowest": (lambda s, a, m: (a / 4).masked_fill(m, LOWEST).softmax(-1), HIDDEN),
    "fill, then scale": (lambda s, a, m: (a.masked_fill(m, -1e9) / 4).softmax(-1), HIDDEN),
    "fill with -1e4, then scale": (lambda s, a, m: (a.masked_fill(m, -1e4) * 0.25).softmax(-1), HIDDEN),
    "where with a tensor": (lambda s, a, m: torch.where(m, torch.tensor(-1e9), a / 4).softmax(-1), HIDDEN),
    "fill twice": (lambda s, a, m: (a / 4).masked_fill(m, -1e9).masked_fill(s.causal, -1e9).softmax(-1), HIDDEN),
    "another axis": (
        lambda s, a, m: (a / 4).masked_fill(m.transpose(1, 2), -1e9).softmax(1).transpose(1, 2),
        HIDDEN,
    ),
    "permuted": (lambda s, a, m: (a / 4).masked_fill(m, -1e9).permute(0, 2, 1).softmax(1).permute(0, 2, 1), HIDDEN),
    "reshaped": (lambda s, a, m: (a / 4).masked_fill(m, -1e9).view(-1, 2, 5, 10).softmax(-1).view(-1, 10, 10), HIDDEN),
    "joined": (
        lambda s, a, m: torch.cat([(a / 4).masked_fill(m, -1e9), a / 4], -1).softmax(-1)[..., :10] * 1.0,
        HIDDEN,
    ),
    "added -inf": (lambda s, a, m: (a / 4 + m).softmax(-1), real(-math.inf)),
    "added -1e4": (lambda s, a, m: (a / 4 + m).softmax(-1), real(-1e4)),
    "added lowest": (lambda s, a, m: (a / 4 + m).softmax(-1), real(LOWEST)),
    "added, then scaled": (lambda s, a, m: ((a + m) / 4).softmax(-1), real(-1e4)),
    "added with a bias": (lambda s, a, m: (a / 4 + m).softmax(-1), real(-1e4, BIAS)),
    "added -inf with a bias": (lambda s, a, m: (a / 4 + m).softmax(-1), real(-math.inf, BIAS)),
    "two added": (lambda s, a, m: (a / 4 + m + s.far).softmax(-1), real(-1e9)),
    "sum of two": (lambda s, a, m: (a / 4 + (m + s.far)).softmax(-1), real(-1e4)),
    "half of an input": (lambda s, a, m: (a / 4 + m * 0.5).softmax(-1), real(-1e9)),
    "where of a bias": (lambda s, a, m: (a / 4 + torch.where(m, -1e4, s.bias)).softmax(-1), HIDDEN),
    "product": (lambda s, a, m: (a / 4 + (1 - m) * -1e4).softmax(-1), (~HIDDEN).float()),
    "product with the lowest": (lambda s, a, m: (a / 4 + (1 - m) * LOWEST).softmax(-1), (~HIDDEN).float()),
    "product the other way": (lambda s, a, m: (a / 4 + (m - 1) * 1e4).softmax(-1), (~HIDDEN).float()),
    "product taken away": (lambda s, a, m: (a / 4 - m * 1e4).softmax(-1), HIDDEN.float()),
    "constant": (lambda s, a, m: (a / 4 + m * 0 + s.far).softmax(-1), real(0.0)),
}


def hidden_keys(style: str) -> Tensor:
    """Where the probability of a style is 0."""
    causal = style in ("fill twice", "two added", "sum of two", "constant")
    own = torch.zeros_like(HIDDEN) if style == "constant" else HIDDEN
    return own | CAUSAL if causal else own


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("style", STYLES)
def test_hidden_keys_count_for_nothing_and_cost_no_codes(style: str, dtype: str) -> None:
    body, mask = STYLES[style]
    net = Net(body).eval()
    wanted = net(X, mask)
    fake, program = converted(net, X, mask, dtype=dtype)
    hidden = hidden_keys(style)
    assert float(wanted[hidden].abs().max()) == 0, "the float net hides them"
    for got in (emulate(program, (X, mask))[0], fake(X, mask)):
        assert float(got[hidden].abs().max()) == 0
        assert sqnr_db(wanted, got) > (18 if dtype == "int8" else 50)
    (got,) = emulate(program, (X, mask))
    assert sqnr_db(got, fake(X, mask)) > (30 if dtype == "int8" else 55), "fake-quant and integer"


@pytest.mark.parametrize("style", ["fill, then scale", "added -inf with a bias", "two added", "product"])
def test_masked_scores_are_exact(style: str) -> None:
    body, mask = STYLES[style]
    _, program = converted(Net(body).eval(), X, mask)
    assert_exact(program, X, mask)
    _, traced = emulate(program, (X, mask), trace=True)
    for name, expected in run(program, X.numpy(), mask.numpy()).items():
        assert int((traced[name].numpy() != expected).sum()) == 0, name
    assert_same_in_onnx(program, X, mask)
