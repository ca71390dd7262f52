"""Functions with poles in training: no infinity in the forward, none in the gradient, and the integers' value there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qatlib.conversion import convert_fx
from qatlib.emulator import emulate
from qatlib.errors import ProgramError
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.fake.train import scorable
from tests.models import calibrated, model

SEEN = torch.linspace(0.3, 4.0, 64).view(8, 8)
"""Calibration data: far from 0."""
BEYOND = torch.cat([torch.zeros(1, 8), torch.full((1, 8), 1e-4), SEEN[:2], torch.full((1, 8), 9.0)])

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "power": lambda x: x**-1.5,
    "root": lambda x: x**0.5,
}


def trained(f: Callable[[Tensor], Tensor]) -> FakeQuantModel:
    torch.manual_seed(0)
    fake = calibrated(model(lambda s, x: f(x * s.gain), gain=nn.Parameter(torch.tensor(1.0))), SEEN)
    set_fake_quantize(fake, FakeQuantState.QAT)
    return fake


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_and_gradients_are_finite_beyond_the_calibrated_range(name: str) -> None:
    fake = trained(FUNCTIONS[name])
    x = BEYOND.clone().requires_grad_()
    out = fake(x)
    assert bool(torch.isfinite(out).all())
    out.sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert bool((x.grad[2:4] != 0).any()), "inside of the range the gradient passes"


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"sqrt", "root"}))  # whose value at 0 is finite
def test_the_poles_have_the_value_of_the_table(name: str) -> None:
    fake = trained(FUNCTIONS[name])
    set_fake_quantize(fake, FakeQuantState.VALIDATION)
    program = convert_fx(fake).program
    assert int(fake(BEYOND[:1]).isfinite().sum()) == 8
    with torch.no_grad():
        apart = (fake(BEYOND) - emulate(program, BEYOND)[0]).abs()
    assert program.ops[-2].kind == "table"
    scale = program.values[program.ops[-2].output].qtype.scale
    assert scale is not None
    assert float(apart[:2].max()) <= 1.01 * scale
    assert float(apart[2:4].max()) <= 1.01 * scale


def test_gradients_inside_are_those_of_the_function() -> None:
    """A root of codes, its slope at them by hand; scales fixed, so nothing else contributes."""
    fake = calibrated(model(lambda s, x: torch.log(x)), SEEN)
    set_fake_quantize(fake, FakeQuantState.QAT)
    for fake_op in (op.activation_post_process for _, op in fake.ops()):
        assert fake_op is not None
        object.__setattr__(fake_op.spec, "averaging_constant", 0.0)
    x = SEEN.clone().requires_grad_()
    fake(x).sum().backward()
    scale = fake.qtype("x.quant").scale
    assert scale is not None
    codes = (SEEN / scale).round().clamp(-128, 127)
    out = fake.qtype("log").scale
    assert out is not None
    inside = ((SEEN / scale).round() <= 127) & ((codes * scale).log().div(out).round().abs() <= 127)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[inside], (1 / (codes * scale))[inside])


def test_a_nan_from_before_is_not_hidden() -> None:
    fake = trained(torch.sqrt)
    x = SEEN.clone()
    x[0, 0] = float("nan")
    assert bool(fake(x).isnan().any())


def test_an_op_that_needs_a_range_by_hand_is_scored_in_fake_quant_form() -> None:
    """1/x of both signs: inside of the calibrated range lies the pole."""
    x = torch.cat([SEEN, -SEEN])
    fake = calibrated(model(lambda s, x: s.fc(1 / x), fc=nn.Linear(8, 3)), x)
    with pytest.raises(ProgramError, match="QAT210") as caught:
        convert_fx(fake)
    integer = scorable(fake)
    assert [op.name for op in integer.program.islands()] == [caught.value.where]
    with torch.no_grad():
        torch.testing.assert_close(integer(x), fake(x), rtol=1e-3, atol=1e-3)
