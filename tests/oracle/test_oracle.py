"""The oracle against numbers worked out by hand, against Fractions, and against torch's float64 convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from qatlib.program import Op, Program, Value
from qatlib.qtype import INT32, QType

from . import FactorError, bias_codes, clamp_codes, factor, half_away, half_even, run
from .integers import sat32
from .run import dequantize, quantize
from .windows import adaptive_bounds

I8 = QType("int8", 0.5)
I16 = QType("int16", 0.25)
F32 = QType("float32")
FULL = {"lo": -128, "hi": 127}


def one(
    kind: str,
    inputs: list[NDArray[Any]],
    types: list[QType],
    out: tuple[tuple[int, ...], QType],
    attrs: Mapping[str, Any],
    **consts: list[Any],
) -> list[Any]:
    """Result of a Program of one op. The ``weight`` is int8, other constants int32."""
    names = tuple(f"x{i}" for i in range(len(inputs)))
    values = {n: Value(n, (-1, *x.shape[1:]), t) for n, x, t in zip(names, inputs, types, strict=True)}
    tensors = {
        role: torch.tensor(data, dtype=torch.int8 if role == "weight" else torch.int32) for role, data in consts.items()
    }
    op = Op(kind, "y", names, attrs, {role: role for role in consts})
    program = Program(names, ("y",), (op,), {**values, "y": Value("y", *out)}, tensors)
    return list(run(program, *inputs)["y"].tolist())


@pytest.mark.parametrize(
    ("numerator", "shift", "even", "away"),
    [
        (1, 1, 0, 1),
        (3, 1, 2, 2),
        (5, 1, 2, 3),
        (-1, 1, 0, -1),
        (-3, 1, -2, -2),
        (-5, 1, -2, -3),
        (6, 2, 2, 2),
        (7, 2, 2, 2),
        (-7, 2, -2, -2),
        (7, 0, 7, 7),
        (-7, 0, -7, -7),
        (2**61, 62, 0, 1),
        (-(2**61), 62, 0, -1),
        (2**61 + 1, 62, 1, 1),
        (-(2**53), 52, -2, -2),
    ],
)
def test_rounding_by_hand(numerator: int, shift: int, even: int, away: int) -> None:
    assert half_even(np.array([numerator]), shift).tolist() == [even]
    assert half_away(np.array([numerator]), shift).tolist() == [away]


def test_rounding_equals_fractions() -> None:
    rng = np.random.default_rng(0)
    for shift in (0, 1, 2, 3, 11, 24, 40, 52, 53, 61, 62):
        numerator = np.concatenate([rng.integers(-(2**53), 2**53, 200), rng.integers(-9, 9, 50) << max(shift - 4, 0)])
        expected = [round(Fraction(int(v), 2**shift)) for v in numerator]
        assert half_even(numerator, shift).tolist() == expected


def test_rounding_refuses_what_it_cannot_do_exactly() -> None:
    with pytest.raises(OverflowError):
        half_even(np.array([2**62]), 3)
    with pytest.raises(ValueError, match="63"):
        half_even(np.array([1]), 63)


def test_sat32() -> None:
    assert sat32(np.array([2**31, -(2**31) - 1, 2**31 - 1, 5])).tolist() == [2**31 - 1, -(2**31), 2**31 - 1, 5]


@pytest.mark.parametrize(
    ("r", "bits", "m", "n"),
    [
        (0.5, 20, 2**19, 20),
        (1.0, 20, 2**19, 19),
        (0.3, 8, 154, 9),
        (255.6, 8, 128, -1),
        (0.9999, 8, 128, 7),
        (127.75, 8, 128, 0),
        (2.0**-43, 20, 2**19, 62),
        (2.0**-60, 8, None, None),
        (2.0**21, 8, None, None),
        (0.0, 8, None, None),
        (math.inf, 8, None, None),
    ],
)
def test_factor_by_hand(r: float, bits: int, m: int | None, n: int | None) -> None:
    if n is None or n < 0:
        with pytest.raises(FactorError):
            factor(r, bits)
    else:
        assert factor(r, bits) == (m, n)


def test_factor_rounds_half_to_even() -> None:
    assert factor(128.5 / 2**10, 8) == (128, 10)
    assert factor(129.5 / 2**10, 8) == (130, 10)


def test_bias_and_clamp_codes_by_hand() -> None:
    assert [bias_codes(b, 0.5, 0.25) for b in (0.3125, 0.4375, -0.3125, 1e12, -1e12)] == [
        2,
        4,
        -2,
        2**31 - 1,
        -(2**31),
    ]
    assert clamp_codes(0.0, 6.0, 0.1, -128, 127) == (0, 60)
    assert clamp_codes(-math.inf, 6.0, 0.01, -128, 127) == (-128, 127)
    assert clamp_codes(0.0, math.inf, 0.01, -128, 127) == (0, 127)
    assert clamp_codes(-1.25, 1.75, 0.5, -128, 127) == (-2, 4)


def test_quantize_and_dequantize_by_hand() -> None:
    x = np.array([0.25, 0.75, -0.25, -0.75, 1.25, 1e9, -np.inf, np.inf, 63.5, -0.0], dtype=np.float32)
    assert quantize(x, I8).tolist() == [0, 2, 0, -2, 2, 127, -128, 127, 127, 0]
    with pytest.raises(ValueError, match="2 elements are NaN"):
        quantize(np.array([np.nan, 1, np.nan], dtype=np.float32), I8)
    assert dequantize(np.array([3, -4], dtype=np.int8), I8, None).tolist() == [1.5, -2.0]
    scale = np.array([0.1], dtype=np.float32)
    accumulator = np.array([2**24 + 1], dtype=np.int32)
    assert dequantize(accumulator, INT32, scale)[0] == np.float32((2**24 + 1) * float(scale[0]))


def test_linear_by_hand() -> None:
    x = np.array([[3, -5]], dtype=np.int8)
    types = [I8]
    attrs = {**FULL, "acc_bound": 0}
    weight = [[2, 1], [1, 1], [-128, 127]]
    assert one("linear", [x], types, ((-1, 3), INT32), {}, weight=weight, bias=[2, 3, 0]) == [[3, 1, -1019]]
    got = one(
        "linear", [x], types, ((-1, 3), I8), attrs, weight=weight, bias=[2, 3, 0], multiplier=[128] * 3, shift=[8, 8, 9]
    )
    assert got == [[2, 0, -128]]
    addend = np.array([[1, 1, 5]], dtype=np.int8)
    got = one(
        "linear",
        [x, addend],
        [I8, I8],
        ((-1, 3), I8),
        attrs,
        weight=weight,
        bias=[2, 3, 0],
        multiplier=[128] * 3,
        addend_multiplier=[128, 64, 2],
        shift=[8, 8, 15],
    )
    assert got == [[2, 1, -4]]


def test_linear_saturates_once() -> None:
    x = np.array([[100, -100]], dtype=np.int8)
    args: dict[str, list[Any]] = {"weight": [[100, 100], [100, 0]], "bias": [2**31 - 1, 2**31 - 1]}
    assert one("linear", [x], [I8], ((-1, 2), INT32), {}, **args) == [[2**31 - 1, 2**31 - 1]]


def test_conv_by_hand() -> None:
    x = np.array([[[1, 2, 3, 4]]], dtype=np.int8)
    attrs = {"stride": [2], "padding": [[1, 0]], "dilation": [2], "groups": 1}
    assert one("conv", [x], [I8], ((-1, 1, 2), INT32), attrs, weight=[[[10, 1]]], bias=[5]) == [[[7, 29]]]
    attrs = {"stride": [1], "padding": [[0, 0]], "dilation": [1], "groups": 2}
    x = np.array([[[1, 2], [3, 4]]], dtype=np.int8)
    got = one("conv", [x], [I8], ((-1, 2, 2), INT32), attrs, weight=[[[1]], [[-1]]], bias=[0, 1])
    assert got == [[[1, 2], [-2, -3]]]


def test_elementwise_by_hand() -> None:
    a, b = np.array([[1, 3, 127]], dtype=np.int8), np.array([[2]], dtype=np.int8)
    assert one("add", [a, b], [I8, I8], ((-1, 3), I8), FULL, multiplier=[128, 64], shift=[8]) == [[1, 2, 64]]
    relu6 = {"lo": 0, "hi": 12}
    assert one("clamp", [np.array([[-3, 5, 99]], dtype=np.int8)], [I8], ((-1, 3), I8), relu6) == [[0, 5, 12]]
    got = one("cat", [a, b], [I8, I8], ((-1, 4), I8), {**FULL, "axis": 1}, multiplier=[128, 128], shift=[7, 8])
    assert got == [[1, 3, 127, 1]]


def test_pools_by_hand() -> None:
    x = np.array([[[-7, -3, -5, -9, -2]]], dtype=np.int8)
    attrs = {"kernel": [2], "stride": [2], "padding": [[1, 0]], "dilation": [1]}
    assert one("max_pool", [x], [I8], ((-1, 1, 3), I8), attrs) == [[[-7, -3, -2]]]
    mean = {"kernel": [2], "stride": [2], "padding": [[1, 0]], **FULL}
    got = one("avg_pool", [x], [I8], ((-1, 1, 3), I8), mean, multiplier=[128, 128, 128], shift=[7, 8, 8])
    assert got == [[[-7, -4, -6]]]
    whole = {"output_size": [2], **FULL}
    got = one("adaptive_avg_pool", [x], [I8], ((-1, 1, 2), I8), whole, multiplier=[171], shift=[9])
    assert got == [[[-5, -5]]]
    assert adaptive_bounds(5, 2) == [(0, 3), (2, 5)]
    assert adaptive_bounds(2, 3) == [(0, 1), (0, 2), (1, 2)]


def test_movement_by_hand() -> None:
    x = np.array([[[1, 2], [3, 4]]], dtype=np.int8)
    assert one("permute", [x], [I8], ((-1, 2, 2), I8), {"dims": [0, 2, 1]}) == [[[1, 3], [2, 4]]]
    assert one("reshape", [x], [I8], ((-1, 4), I8), {"shape": [-1, 4]}) == [[1, 2, 3, 4]]


def test_run_refuses_a_result_that_contradicts_its_value() -> None:
    x = np.array([[1, 2]], dtype=np.int16)
    with pytest.raises(ValueError, match="outside int8"):
        one("clamp", [x * 200], [I16], ((-1, 2), I8), {"lo": -1000, "hi": 1000})
    with pytest.raises(ValueError, match="has shape"):
        one("reshape", [x], [I16], ((-1, 3), I16), {"shape": [1, 2]})


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_equals_torch_float64(rank: int, groups: int) -> None:
    rng = np.random.default_rng(rank)
    x = rng.integers(-(2**15), 2**15, (2, 4, *[7] * rank)).astype(np.int16)
    weight = rng.integers(-128, 128, (6, 4 // groups, *[3, 2, 1][:rank]))
    bias = rng.integers(-(2**20), 2**20, 6)
    stride, dilation = [2, 1, 3][:rank], [1, 2, 1][:rank]
    padding = [[1, 2], [0, 1], [2, 0]][:rank]
    flat = [side for before_after in reversed(padding) for side in before_after]
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    expected = convolution(
        functional.pad(torch.from_numpy(x).double(), flat),
        torch.from_numpy(weight).double(),
        torch.from_numpy(bias).double(),
        stride,
        0,
        dilation,
        groups,
    )
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shape = (-1, *expected.shape[1:])
    got = one("conv", [x], [I16], (shape, INT32), attrs, weight=weight.tolist(), bias=bias.tolist())
    assert got == expected.long().tolist()
