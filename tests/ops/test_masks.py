"""Attention masks, in every way that people write them: hidden keys count for nothing, and cost the others no codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.fake.state import FakeQuantState
from tests.models import model
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
    "constant with a bias": (lambda s, a, m: (a / 4 + m * 0 + (s.far + s.bias)).softmax(-1), real(0.0)),
    "constant": (lambda s, a, m: (a / 4 + m * 0 + s.far).softmax(-1), real(0.0)),
}


def hidden_keys(style: str) -> Tensor:
    """Where the probability of a style is 0."""
    causal = style in ("fill twice", "two added", "sum of two", "constant", "constant with a bias")
    own = torch.zeros_like(HIDDEN) if style.startswith("constant") else HIDDEN
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


# -- other readers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("fill", [-1e4, -1e9, -math.inf])
def test_log_softmax(fill: float, dtype: str) -> None:
    """Visible keys have their log-probability; hidden ones the lowest code."""
    net = Net(lambda s, a, m: (a / 4).masked_fill(m, fill).log_softmax(-1)).eval()
    _, program = converted(net, X, HIDDEN, dtype=dtype)
    (got,) = emulate(program, (X, HIDDEN))
    visible = net(X, HIDDEN)[~HIDDEN]
    assert sqnr_db(visible, got[~HIDDEN]) > (25 if dtype == "int8" else 50)
    lowest_visible = got.masked_fill(HIDDEN, 0.0).amin(-1, keepdim=True).expand(4, 10, 10)
    assert bool((got <= lowest_visible)[HIDDEN].all())
    assert float(got[HIDDEN].max()) > float(got[~HIDDEN].min()) * 1.5, "no codes are lost to what is hidden"


LARGEST: dict[str, Body] = {
    "amax": lambda s, a, m: a.masked_fill(m, -1e4).amax(-1),
    "max": lambda s, a, m: (a.masked_fill(m, -1e4) / 4).max(-1).values,
    "argmax": lambda s, a, m: a.masked_fill(m, -1e4).argmax(-1),
    "added": lambda s, a, m: (a + m * -1e4).argmax(-1),
    "topk": lambda s, a, m: a.masked_fill(m, -1e4).topk(1).indices,
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_of_what_is_visible(name: str) -> None:
    """Also where all of a row is as low as anything that calibration saw: a mask is lower."""
    mask = HIDDEN.float() if name == "added" else HIDDEN
    net = Net(LARGEST[name]).eval()
    wanted = net(X, mask)
    fake, program = converted(net, X, mask, dtype="int16")
    for got in (emulate(program, (X, mask))[0], fake(X, mask)):
        if wanted.is_floating_point():
            assert sqnr_db(wanted, got) > 60
        else:
            assert float((got == wanted).float().mean()) > 0.98
            chosen = HIDDEN.gather(-1, got.long().view(4, 10, 1))
            assert not bool(chosen.any())


def test_what_else_reads_the_scores_keeps_their_range() -> None:
    def body(s: Net, a: Tensor, m: Tensor) -> Any:
        scores = a / 4 + m
        return scores.softmax(-1), scores

    fake, _ = converted(Net(body).eval(), X, real(-1e4))
    assert fake.qtype("add").scale == pytest.approx(1e4 / 127.5, rel=0.01)
    assert fake.qtype("mask.quant").scale == pytest.approx(1e4 / 127.5, rel=0.01)


def test_low_numbers_that_are_no_masks_keep_their_range() -> None:
    """A pressure is no mask, and neither are logits in thousands."""
    pressure = Net(lambda s, a, m: (a + m).mean(-1)).eval()
    fake, _ = converted(pressure, X, torch.full((4, 10, 10), -2e4))
    assert fake.qtype("mask.quant").scale == pytest.approx(2e4 / 127.5, rel=0.01)
    fake, _ = converted(Net(lambda s, a, m: (a * 1e3).argmax(-1)).eval(), X, HIDDEN)
    assert fake.qtype("mul").scale > 5e3 / 127.5


def test_a_row_of_masks_alone() -> None:
    """Padding hides whole rows: the others keep their codes."""
    mask = HIDDEN.clone()
    mask[2, 3:] = True
    net = Net(STYLES["fill, then scale"][0]).eval()
    _, program = converted(net, X, mask, dtype="int16")
    kept = ~mask.all(-1)
    assert sqnr_db(net(X, mask)[kept], emulate(program, (X, mask))[0][kept]) > 50


def test_training_keeps_room_for_masks() -> None:
    body, mask = STYLES["added -inf with a bias"]
    fake, _ = converted(Net(body).eval(), X, mask)
    before = {name: fake.qtype(name).scale for name in ("mask.quant", "add")}
    fake.set_state(FakeQuantState.QAT)
    for _ in range(200):
        fake(X, mask)
    for name, scale in before.items():
        assert fake.qtype(name).scale == pytest.approx(scale, rel=0.05), name


def test_the_room_is_in_the_checkpoint() -> None:
    body, mask = STYLES["constant with a bias"]
    net = Net(body).eval()
    fake, _ = converted(net, X, mask)
    again = prepare_qat_fx(net, get_default_qconfig("int8", "min_max"), example_inputs=(X, mask))
    again.load_state_dict(fake.state_dict())
    torch.testing.assert_close(again(X, mask), fake(X, mask), rtol=0, atol=0)


def test_large_results_of_a_linear_are_no_masks() -> None:
    """A result scaled back to its units may be below -5000 everywhere."""
    net = model(lambda s, x: (s.linear(x) * 1e4 - 3e4).amax(1), linear=nn.Linear(16, 3))
    _, program = converted(net, X)
    with torch.no_grad():
        assert sqnr_db(net(X), emulate(program, X)[0]) > 25


@pytest.mark.parametrize("style", ["fill", "fill with -1e4"])
def test_masks_that_a_float_operator_puts_in(style: str) -> None:
    """What quantizes its result looks past them as well."""
    body, mask = STYLES[style]
    net = Net(body).eval()
    fake = prepare_qat_fx(net, {}, True, {"module_name": ["masked_fill"]}, example_inputs=(X, mask))
    calibrate(fake, [(X, mask)])
    with torch.no_grad():
        assert sqnr_db(net(X, mask), emulate(to_program(fake), (X, mask))[0]) > 25


class Hiding(nn.Module):
    def forward(self, a: Tensor, m: Tensor) -> Tensor:
        return a.masked_fill(m, -1e9)


def test_masks_from_a_module_that_is_kept_whole() -> None:
    net = Net(lambda s, a, m: s.hide(a, m).softmax(-1)).eval()
    net.hide = Hiding()
    fake = prepare_qat_fx(net, example_inputs=(X, HIDDEN), leaf=["hide"])
    calibrate(fake, [(X, HIDDEN)])
    scale = fake.qtype("hide.quant").scale
    assert scale is not None
    assert scale < 2
