"""Faults that are found by computing the op again. They are planted by the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qatlib.conversion import convert_fx
from qatlib.fake.stubs import QuantStub
from qatlib.golden import Golden, load_golden, write_golden
from tests.golden.planting import (
    Array,
    Fault,
    again,
    clamped,
    exact,
    floor,
    half_to_zero,
    half_up,
    parted,
    truncate,
)
from tests.models import calibrated, model
from tests.oracle import half_away, single_precision
from tests.oracle.integers import Rounding


def _accumulator(golden: Golden, name: str) -> Array:
    """Exact sum of products of a convolution or linear layer."""
    op = golden.ops[name]
    count = golden.program.constant(op, "shift").numel()
    bare = {"multiplier": np.ones(count, np.int64), "shift": np.zeros(count, np.int64)}
    return again(golden, name, **bare, lo=-(2**31), hi=2**31 - 1)


def _requantized(golden: Golden, name: str, acc: Array) -> Array:
    op = golden.ops[name]
    m, n = (golden.program.constant(op, role).numpy().astype(np.float64) for role in ("multiplier", "shift"))
    shape = (-1, 1, 1) if op.kind == "conv" else (-1,)
    return clamped(golden, name, acc * (m / 2.0**n).reshape(shape))


def _rounded(name: str, rule: Rounding, said: str, kinds: str = "rounding") -> Fault:
    return Fault(name, lambda g: again(g, name, rule).astype(g.by_name[name].dtype), kinds, said)


def _narrow(name: str, change: Callable[[Array], Array], said: str) -> Fault:
    return Fault(name, lambda g: _requantized(g, name, change(_accumulator(g, name))), "saturation", said)


def _scaled(name: str, factor: Any, said: str) -> Fault:
    return Fault(name, lambda g: clamped(g, name, exact(g, name) * factor), "scale", said)


def _quotient(g: Golden) -> Array:
    return g.tensors["x"] / np.float32(g.by_name["x.quant"].scale)


def _codes(real: Array) -> Array:
    return np.clip(real, -128, 127).astype(np.int8)


def _apart(g: Golden) -> Array:
    """Two addends that are requantized on their own."""
    op = g.ops["add"]
    m, (n,) = (g.program.constant(op, role).numpy() for role in ("multiplier", "shift"))
    return clamped(g, "add", sum(np.rint(g.tensors[x] * (k / 2.0**n)) for x, k in zip(op.inputs, m, strict=True)))


ROUNDED = ("stem", "depthwise", "add", "cat", "smooth", "pool", "hidden", "block.conv")
RECOMPUTED: dict[str, Fault] = {
    **{f"floor at {name}": _rounded(name, floor, "floor") for name in ROUNDED},
    **{f"truncation at {name}": _rounded(name, truncate, "towards zero (trunc") for name in ROUNDED},
    "addends rounded one by one": Fault("add", _apart, "rounding", "each term rounded before"),
    "input rounded down": Fault("x.quant", lambda g: _codes(np.floor(_quotient(g))), "rounding", "floor"),
    "input truncated": Fault("x.quant", lambda g: _codes(np.trunc(_quotient(g))), "rounding", "towards zero"),
    "sums that wrap at 16 bits": _narrow("hidden", lambda x: x.astype(np.int16), "wraps at 16 bits"),
    "sums that saturate at 16 bits": _narrow("hidden", lambda x: np.clip(x, -(2**15), 2**15 - 1), "saturates at 16"),
    "no bias": Fault(
        "hidden", lambda g: again(g, "hidden", bias=np.zeros(64, np.int64)).astype(np.int8), "operand", "no bias"
    ),
    "no bias of an accumulator": Fault(
        "head", lambda g: again(g, "head", bias=np.zeros(10, np.int64)), "operand", "no bias"
    ),
    "no bias, seen behind a dequantize": Fault(
        "head.dequant",
        lambda g: (again(g, "head", bias=np.zeros(10, np.int64)) * g.lsb("head.dequant")).astype(np.float32),
        "operand",
        "no bias, every element equals the device (of head",
        ("head",),
    ),
    "no addend": Fault(
        "block.conv",
        lambda g: again(g, "block.conv", addend_multiplier=np.zeros(8, np.int64)).astype(np.int8),
        "operand",
        "all but the addend",
    ),
    "no first operand": Fault(
        "add",
        lambda g: again(g, "add", multiplier=g.program.constant(g.ops["add"], "multiplier").numpy() * [0, 1]),
        "operand",
        "all but the first operand",
    ),
    "a relu that is not applied": Fault(
        "stem", lambda g: again(g, "stem", lo=-128).astype(np.int8), "saturation", "fused activation"
    ),
    "a shift too large": _scaled("depthwise", 0.5, "2^-1"),
    "a factor that moves codes by one": _scaled("depthwise", 1.07, "1.07"),
    "a factor of one channel": _scaled("depthwise", np.array([1, 1, 1.5, 1, 1, 1, 1, 1])[:, None, None], "for 1 of 8"),
    "factors of few bits": _scaled("stem", 1 + np.linspace(-0.01, 0.01, 8)[:, None, None], "for 8 of 8 channels"),
    "a factor of an accumulator": Fault("head", lambda g: g.tensors["head"] * 2, "scale", "2^1"),
    "scale by 127 for 127.5": Fault(
        "x.quant", lambda g: _codes(np.rint(_quotient(g) * (127 / 127.5))), "scale", "0.996"
    ),
    "scale by 128 for 127.5": Fault(
        "x.quant", lambda g: _codes(np.rint(_quotient(g) * (128 / 127.5))), "scale", "1.0039"
    ),
}


@pytest.mark.parametrize("fault", RECOMPUTED.values(), ids=RECOMPUTED.keys())
def test_a_fault_of_one_op(golden: Golden, tmp_path: Path, fault: Fault) -> None:
    comparison = fault.check(golden, tmp_path)
    assert comparison.first == comparison.first_numbers


TIES: dict[str, Fault] = {
    "half away": _rounded("pool", half_away, "half away from zero,"),
    "half up": _rounded("pool", half_up, "with half up,"),
    "half towards zero": _rounded("pool", half_to_zero, "half towards zero,"),
    "two rules for numbers that are not negative": _rounded("add", half_away, "half away from zero or half up"),
    "no rule": Fault(
        "pool",
        lambda g: np.where(
            np.arange(g.tensors["pool"].size).reshape(g.tensors["pool"].shape) % 2,
            again(g, "pool", half_up),
            again(g, "pool", half_to_zero),
        ),
        "rounding",
        "by no one rule",
    ),
}


@pytest.mark.parametrize("fault", TIES.values(), ids=TIES.keys())
def test_ties_tell_the_rules_apart(ties: Golden, tmp_path: Path, fault: Fault) -> None:
    real, codes = exact(ties, fault.name), fault.plant(ties)
    at_ties = (real % 1 == 0.5) & (codes != ties.tensors[fault.name])
    assert at_ties.sum() >= 10
    first = fault.check(ties, tmp_path).first
    assert first is not None
    assert first.cause.evidence["at_ties"] == at_ties.sum()


def test_a_float32_product_is_told_from_the_exact_one(wide: Golden, tmp_path: Path) -> None:
    _rounded("c", single_precision, "product in float32").check(wide, tmp_path)


SATURATED: dict[str, Fault] = {
    "codes that wrap": Fault("c", lambda g: np.rint(exact(g, "c")).astype(np.int64).astype(np.int8), "saturation",
                             "wrap modulo 256"),
    "an input that wraps": Fault(
        "q",
        lambda g: np.rint(g.tensors["x"] / np.float32(0.01)).astype(np.int64).astype(np.int8),
        "saturation",
        "wrap modulo 256",
    ),
    "symmetric codes": Fault("c", lambda g: np.clip(g.tensors["c"], -127, 127), "saturation", "[-127, 127]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SATURATED.values(), ids=SATURATED.keys())
def test_where_the_golden_codes_saturate(narrow: Golden, tmp_path: Path, fault: Fault) -> None:
    assert np.isin(narrow.tensors[fault.name], (-128, 127)).mean() > 0.01
    fault.check(narrow, tmp_path)


def test_int16_is_recomputed_too(wide: Golden, tmp_path: Path) -> None:
    _rounded("c", floor, "floor").check(wide, tmp_path)


def test_quotients_that_a_device_forms_in_double_precision(tmp_path: Path) -> None:
    """Between two codes, float32 rounds the quotient onto the half or off it."""
    x = ((torch.arange(96) - 48.5) * 0.1).view(2, 3, 4, 4)
    net = model(lambda s, x: s.c(s.q(x)), q=QuantStub(0.1), c=nn.Conv2d(3, 2, 3))
    write_golden(convert_fx(calibrated(net, x)).program, x, tmp_path / "golden")
    double = np.rint(x.double().numpy() / np.float64(np.float32(0.1))).astype(np.int8)
    fault = Fault("q", lambda g: double, "float_rounding", "float32 cannot tell")
    fault.check(load_golden(tmp_path / "golden"), tmp_path)


def test_the_interval_of_a_factor(golden: Golden, tmp_path: Path) -> None:
    first = RECOMPUTED["a factor that moves codes by one"].check(golden, tmp_path).first
    assert first is not None
    evidence = first.cause.evidence
    assert float(evidence["factor_min"]) <= 1.07 <= float(evidence["factor_max"])
    assert float(evidence["factor_max"]) - float(evidence["factor_min"]) < 0.01


def test_one_code_is_no_evidence_of_a_factor(golden: Golden, tmp_path: Path) -> None:
    """The code nearest to a half, moved: some factor next to 1 explains it, and so do many other things."""
    real = exact(golden, "depthwise")
    codes = golden.tensors["depthwise"].copy()
    away = np.abs(real - np.floor(real) - 0.5)
    at = np.unravel_index(np.where(away > 0, away, 1).argmin(), real.shape)
    codes[at] += 1 if real[at] > codes[at] else -1
    comparison = parted(golden, tmp_path, {"depthwise": codes})
    assert comparison.first is not None
    assert comparison.first.cause.kind in ("unknown", "rounding")
