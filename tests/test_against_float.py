"""Integers against the float model, where emulator, oracle and ONNX could agree on what was lowered wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatlib.conversion import convert_fx
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.qtype import QType
from qatlib.tables import Source, TableSpec, build
from tests.models import calibrated, model


def sqnr_db(wanted: Tensor, got: Tensor) -> float:
    wanted, got = wanted.detach().double(), got.detach().double()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum().clamp_min(1e-30)))


def integers_of(net: nn.Module, x: Tensor, **options: Any) -> Tensor:
    out: Tensor = convert_fx(calibrated(net, x, **options))(x)
    return out


NEGATIVE = -(torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) * 4 + 1)


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: 1 / (-x),
        lambda s, x: (-x) ** -2,
        lambda s, x: torch.log(-x),
        lambda s, x: 1 / x.abs(),
        lambda s, x: torch.sqrt(-x.log_softmax(-1)),
        lambda s, x: 1 / (x + 3).clamp(min=0.05),
        lambda s, x: torch.rsqrt(torch.nn.functional.pad(-x, (1, 1), value=0.5)),
    ],
    ids=["1/(-x)", "power", "log", "1/abs", "sqrt", "1/clamp", "padded"],
)
def test_a_function_with_poles_behind_a_change_of_sign_or_range(f: Callable[[Any, Tensor], Tensor]) -> None:
    net = model(f)
    assert sqnr_db(net(NEGATIVE), integers_of(net, NEGATIVE)) > 30


@pytest.mark.parametrize("name", ["hardswish", "elu", "celu", "gelu", "silu"])
@pytest.mark.parametrize("spec", [TableSpec(), TableSpec(division=(3.5,)), TableSpec(division=(6.0,)),
                                  TableSpec(range=(4.0, 8.0)), TableSpec(division="uniform")])  # fmt: skip
def test_the_last_entry_of_a_segment_fits_16_bits(name: str, spec: TableSpec) -> None:
    """With the scale of the input, the output reaches the last code, and the chord behind it cannot."""
    wide = QType("int16", 8 / 32767.5)
    f = getattr(nn.functional, name)
    table = build(lambda x: f(torch.from_numpy(x)).numpy(), Source(wide, (-32768, 32767)), wide, wide.limits, spec, "f")
    x = np.arange(-32768, 32768)
    clipped = x * wide.scale if spec.range is None else np.clip(x * wide.scale, *spec.range)
    wanted = np.clip(f(torch.from_numpy(clipped)).numpy() / wide.scale, *wide.limits)
    assert float(np.abs(table(x) - wanted).max()) < 2


@pytest.mark.parametrize("tiny", [1e-12, 1e-20, 1e-36, 1e-44])
@pytest.mark.parametrize("bias", [0.0, 1e-6, 0.5])
def test_a_channel_of_hardly_any_weight_converts(tiny: float, bias: float) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        conv.weight[0] *= tiny
        conv.bias[0] = bias
    net, x = model(lambda s, x: torch.relu(s.conv(x)), conv=conv), torch.randn(4, 3, 5, 5)
    wanted, got = net(x).detach(), integers_of(net, x)
    assert sqnr_db(wanted, got) > 30
    assert float((wanted - got)[:, 0].abs().max()) < 0.02


def test_an_output_that_calibration_saw_dead_saturates() -> None:
    net, x = model(lambda s, x: torch.relu(s.conv(x)), conv=nn.Conv2d(3, 2, 1)), torch.rand(4, 3, 5, 5)
    with torch.no_grad():
        net.conv.weight.fill_(-100.0)
        net.conv.bias.fill_(0.0)
    assert integers_of(net, x).abs().max() == 0


def rows_with_one_degenerate(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0
    return x


@pytest.mark.parametrize(
    "net",
    [
        model(lambda s, x: nn.functional.normalize(x, dim=-1)),
        model(lambda s, x: s.norm(x), norm=nn.LayerNorm(8, eps=1e-12)),
        model(lambda s, x: s.norm(x), norm=nn.RMSNorm(8)),
        model(lambda s, x: x / (x.std(-1, keepdim=True) + 1e-6)),
        model(lambda s, x: x / (x.abs().sum(-1, keepdim=True) + 1e-8)),
        model(lambda s, x: x * (x.square().mean(-1, keepdim=True) + 1e-10) ** -0.5),
    ],
    ids=["normalize", "layer norm", "rms norm", "over std", "over sum", "power"],
)
def test_a_degenerate_row_leaves_the_others_their_codes(net: nn.Module) -> None:
    """At a row of zeros 1/x is 1/eps; what is more than one code of x gives counts for the scale."""
    x = rows_with_one_degenerate(16, 6, 8)
    wide = get_default_qconfig("int16", "min_max")
    assert sqnr_db(net(x), integers_of(net, x, qconfig_dict=wide)) > 40


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: x.clamp(-1.03, 0.31) * 2,
        lambda s, x: torch.rsqrt(x.abs().clamp(min=0.04)),
        lambda s, x: nn.functional.pad(x, (0, 2), value=-7.0) + 1,
        lambda s, x: nn.functional.pad(x, (0, 2), value=0.123) * 3,
    ],
    ids=["clamp", "clamp before a table", "pad beyond the range", "pad between codes"],
)
def test_fake_quant_shows_what_rounding_a_bound_or_a_padding_costs(f: Callable[[Any, Tensor], Tensor]) -> None:
    """The bounds of clamp and the value of pad are rounded to codes, so fake-quant has to round them too."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    fake = calibrated(model(f), x)
    step = max(fake.qtype(name).scale or 0.0 for name in fake.graph.outputs)
    assert float((fake(x) - convert_fx(fake)(x)).abs().max()) <= 1.01 * step
