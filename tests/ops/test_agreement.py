"""Fake-quant and Program differ by at most one code, on fewer than 0.1 % of the elements, given the same integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qatlib.analysis.agreement import gaps
from qatlib.conversion import convert_fx, to_program
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import QConfig, get_default_qconfig
from tests.models import Everything, calibrated, images, lively
from tests.ops.agreement import assert_agree

ROUNDING = {"quantize", "conv", "linear", "add", "cat", "avg_pool", "adaptive_avg_pool"}


def everything(outputs: int = 64) -> nn.Module:
    torch.manual_seed(0)
    net = Everything()
    net.head = nn.Linear(64, outputs)
    return lively(net).eval()


def prepared(**options: Any) -> FakeQuantModel:
    return calibrated(everything(), images(64), **options)


@pytest.mark.parametrize("method", ["percentile", "min_max"])
def test_every_operator(method: str) -> None:
    net = prepared(qconfig_dict=get_default_qconfig(method=method))
    program = convert_fx(net).program
    assert {op.kind for op in program} >= ROUNDING
    found = assert_agree(net, program, images(320, seed=2))
    assert set(found) == {name for name, _ in net.ops()}


def test_int16_activations() -> None:
    """16-bit codes times a 20-bit multiplier carry up to 2^15 * 2^-20 = 1/32 code, so more round the other way."""
    names = ("alone", "smooth", "cat", "pool")
    net = prepared(
        qconfig_dict={"": QConfig(), "module_name": dict.fromkeys(names, get_default_qconfig("int16", "min_max"))}
    )
    program = convert_fx(net).program
    assert program.values["cat"].qtype.dtype == "int16"
    found = gaps(net, program, images(320, seed=2))
    assert all(gap.largest <= 1 for gap in found.values()), found
    wide = {op.name for op in program if any(value.qtype.dtype == "int16" for value in program.in_values(op))} | set(
        names
    )
    assert all(gap.share < (1 / 32 if name in wide else 1e-3) for name, gap in found.items()), found


@pytest.mark.parametrize("bits", [12, 21])
def test_multiplier_bits_are_what_separates_the_two_worlds(bits: int) -> None:
    net = prepared()
    found = gaps(net, to_program(net, multiplier_bits=bits), images(64, seed=2))
    worst = max(gap.share for gap in found.values())
    assert worst > 1e-3 if bits == 12 else worst < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_nets(seed: int) -> None:
    torch.manual_seed(seed)
    net = Everything()
    net.head = nn.Linear(64, 64)
    fake = calibrated(lively(net, seed).eval(), images(64, seed=seed))
    assert_agree(fake, convert_fx(fake).program, images(640, seed=seed + 100))
