"""Every kind of Program op on a few elements worked out by hand from section 4 of ``docs/numerics.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qatlib.qtype import limits

from . import addend_factor, compare_factors, half_even, lone_factor, signed_pair, sum_factor, test_oracle
from .integers import INT32_MAX, INT32_MIN
from .kernels import INTEGER_KINDS
from .task import Task

FULL = {"lo": -128, "hi": 127}
HALF = {"multiplier": [1], "shift": [1]}
ONE = {"multiplier": [1], "shift": [0]}


def op(
    kind: str,
    *inputs: Any,
    attrs: dict[str, Any] | None = None,
    consts: dict[str, Any] | None = None,
    dtype: str = "int8",
    scale: float | None = 1.0,
) -> Any:
    """Result of one op on nested lists; ``dtype`` and ``scale`` are those of the output."""
    arrays = {role: np.array(data, dtype=np.int64) for role, data in (consts or {}).items()}
    task = Task(attrs or {}, arrays, limits(dtype), None if dtype == "int32" else scale, half_even)
    return INTEGER_KINDS[kind](task, *(np.array(x, dtype=np.int64) for x in inputs)).tolist()


def test_every_kind_is_tested_by_hand() -> None:
    text = "".join(Path(module).read_text() for module in (__file__, test_oracle.__file__))
    assert [kind for kind in INTEGER_KINDS if f'op("{kind}"' not in text and f'one("{kind}"' not in text] == []


# -- element by element -------------------------------------------------------------------------------------------


def test_add() -> None:
    consts = {"multiplier": [3, -1], "shift": [1]}
    assert op("add", [1, 2, 100], [1, 5, -1], attrs=FULL, consts=consts) == [1, 0, 127]  # 2/2, 1/2, 301/2
    assert op("add", [[1], [2]], [4, 6], attrs=FULL, consts={"multiplier": [1, 1], "shift": [0]}) == [[5, 7], [6, 8]]


def test_mul() -> None:
    assert op("mul", [3, 5, -7], [1, 1, 100], attrs=FULL, consts=HALF) == [2, 2, -128]  # 1.5, 2.5, -350


def test_extrema_of_two() -> None:
    consts = {"multiplier": [1, 1], "shift": [1, 0]}
    assert op("maximum", [6, -6, 5], [2, 2, 2], attrs=FULL, consts=consts) == [3, 2, 2]  # 3, -3, 2.5
    assert op("minimum", [6, -6, 5], [2, 2, 2], attrs=FULL, consts=consts) == [2, -3, 2]


def test_signs() -> None:
    assert op("neg", [-128, 5]) == [127, -5]
    assert op("abs", [-128, -5, 3]) == [127, 5, 3]
    assert op("neg", [INT32_MIN], dtype="int32") == [INT32_MAX]


def test_compare_across_scales() -> None:
    """3 * 0.5 against 2 * 0.75: equal; and a number next to an integer."""
    m, e = compare_factors((0.5, 0.75))
    assert (m, e) == ([1, 3], [1, 0])
    consts = {"mantissa": m, "exponent": e}
    results = {"gt": 0, "ge": 1, "lt": 0, "le": 1, "eq": 1, "ne": 0}
    for function, expected in results.items():
        assert op("compare", [3], [2], attrs={"function": function}, consts=consts) == [expected]
        assert op("compare", [4], [2], attrs={"function": function}, consts=consts) == [function in ("gt", "ge", "ne")]
    assert compare_factors((None, 6.0)) == ([1, 3], [0, 1])
    assert compare_factors((2.0**-100, 1.0)) == ([1, 1], [0, 64])


def test_logical() -> None:
    a, b = [0, 0, 1, 1], [0, 1, 0, 1]
    assert op("logical", a, attrs={"function": "not"}) == [1, 1, 0, 0]
    for function, expected in (("and", [0, 0, 0, 1]), ("or", [0, 1, 1, 1]), ("xor", [0, 1, 1, 0])):
        assert op("logical", a, b, attrs={"function": function}) == expected


def test_where() -> None:
    two = {"multiplier": [1, 2], "shift": [1, 0]}
    attrs = {"true": None, "false": None, **FULL}
    assert op("where", [1, 0], [7, 7], [100, 60], attrs=attrs, consts=two) == [4, 120]
    assert op("where", [1, 0], [7, 7], attrs={"true": -9, "false": None, **FULL}, consts=HALF) == [-9, 4]
    assert op("where", [1, 0], [7, 7], attrs={"true": None, "false": -9, **FULL}, consts=HALF) == [4, -9]


def test_cast() -> None:
    assert op("cast", [0, 1, 3, 300], attrs=FULL, scale=2.0) == [0, 0, 2, 127]  # 0, 0.5, 1.5, 150
    assert op("cast", [0, 1], attrs={"lo": INT32_MIN, "hi": INT32_MAX}, dtype="int32") == [0, 1]


def test_prelu() -> None:
    consts = {"multiplier": [4], "negative_multiplier": [1], "shift": [2]}
    assert op("prelu", [[5, -5, -6, -10]], attrs=FULL, consts=consts) == [[5, -1, -2, -2]]  # -1.25, -1.5, -2.5
    per_channel = {"multiplier": [2, 2], "negative_multiplier": [1, -1], "shift": [1, 1]}
    assert op("prelu", [[[-4], [-4]]], attrs=FULL, consts=per_channel) == [[[-2], [2]]]


def test_integers_without_a_scale_saturate() -> None:
    top, bottom = INT32_MAX, INT32_MIN
    full = {"lo": bottom, "hi": top}
    weights = {"multiplier": [1, -3], "shift": [0]}
    assert op("add", [5, bottom], [2, 1], attrs=full, consts=weights, dtype="int32") == [-1, bottom]
    assert op("mul", [bottom, 7], [bottom, 6], attrs=full, consts=ONE, dtype="int32") == [top, 42]
    pair = {"multiplier": [1, 1], "shift": [0, 0]}
    assert op("maximum", [bottom, 7], [top, 6], attrs=full, consts=pair, dtype="int32") == [top, 7]
    attrs = {"true": top, "false": None, **full}
    assert op("where", [1, 0], [4, 4], attrs=attrs, consts=ONE, dtype="int32") == [top, 4]
    assert op("clamp", [-5, 5], attrs={"lo": -1, "hi": 2}, dtype="int32") == [-1, 2]


# -- sums ---------------------------------------------------------------------------------------------------------


def test_sum() -> None:
    x = [[[1, 2], [3, 5]]]
    attrs = {"axes": [2], "keepdim": False, "divisor": 2, **FULL}
    assert op("sum", x, attrs=attrs, consts=HALF) == [[2, 4]]  # 1.5, 4
    attrs = {"axes": [1, 2], "keepdim": True, "divisor": 1, **FULL}
    assert op("sum", x, attrs=attrs, consts=ONE) == [[[11]]]
    counts = {"axes": [1], "keepdim": False}
    assert op("sum", [[INT32_MAX, 1], [1, 1]], attrs=counts, dtype="int32") == [INT32_MAX, 2]


def test_extrema_over_axes() -> None:
    x = [[[1, -2], [3, -5]]]
    assert op("amax", x, attrs={"axes": [2], "keepdim": False}) == [[1, 3]]
    assert op("amin", x, attrs={"axes": [1, 2], "keepdim": True}) == [[[-5]]]


def test_matmul() -> None:
    a, b = [[[1, 2], [3, 4]]], [[10], [1]]
    attrs = {"factor": 1.0, "drop": [0, 0], **FULL}
    assert op("matmul", a, b, attrs=attrs, consts=HALF) == [[[6], [17]]]  # 12 / 2, 34 / 2
    attrs["drop"] = [1, 0]
    assert op("matmul", a, b, attrs=attrs, consts=ONE) == [[[1], [22]]]  # 0.5 and 1.5 are rounded to even: 0, 1; 2, 2


def test_matmul_saturates() -> None:
    wide = [[[-32768, -32768]]]
    attrs = {"factor": 1.0, "drop": [0, 0], "lo": -32768, "hi": 32767}
    got = op(
        "matmul", wide, [[-32768], [-32768]], attrs=attrs, consts={"multiplier": [1], "shift": [17]}, dtype="int16"
    )
    assert got == [[[16384]]]  # 2^31 - 1 over 2^17


def test_positions_of_extrema() -> None:
    x = [[3, 7, 7, -1]]
    assert op("argmax", x, attrs={"axis": 1, "keepdim": False}, dtype="int32") == [1]
    assert op("argmin", [[2, 0, 0]], attrs={"axis": 1, "keepdim": True}, dtype="int32") == [[1]]
    assert op("topk", x, attrs={"axis": 1, "k": 3, "largest": True}, dtype="int32") == [[1, 2, 0]]
    assert op("topk", [[0, 5, 0]], attrs={"axis": 1, "k": 2, "largest": False}, dtype="int32") == [[0, 2]]


def test_adaptive_max_pool() -> None:
    assert op("adaptive_max_pool", [[[1, 9, 2, 3, 4]]], attrs={"output_size": [2]}) == [[[9, 4]]]


# -- movement -----------------------------------------------------------------------------------------------------


def test_constant_and_joints_keep_codes() -> None:
    assert op("constant", consts={"value": [[1, -2]]}) == [[1, -2]]
    assert op("cat", [[1]], [[0, 1]], attrs={"axis": 1}) == [[1, 0, 1]]


def test_cuts() -> None:
    x = [[0, 1, 2, 3, 4, 5]]
    attrs = {"axes": [1], "starts": [1], "stops": [5], "steps": [2]}
    assert op("slice", x, attrs=attrs) == [[1, 3]]
    assert op("take", x, attrs={"axis": 1, "index": [5, 0, 0]}) == [[5, 0, 0]]


def test_gather() -> None:
    x, index = [[[1, 2], [3, 4]]], [[[1], [0]]]
    assert op("gather", x, index, attrs={"axis": 2}) == [[[2], [3]]]
    assert op("gather", x, [[[1, 0]]], attrs={"axis": 1}) == [[[3, 2]]]
    for wrong in (2, -1):
        with pytest.raises(IndexError):
            op("gather", [[1, 2]], [[wrong]], attrs={"axis": 1})


def test_embedding() -> None:
    table = [[1, 2], [3, 4], [5, 6]]
    assert op("embedding", table, [[2, 0]]) == [[[5, 6], [1, 2]]]
    for wrong in (3, -1):
        with pytest.raises(IndexError):
            op("embedding", table, [wrong])


def test_expand() -> None:
    assert op("expand", [[1], [2]], attrs={"shape": [-1, 2], "batch": [0, 0, 1]}) == [[1, 1], [2, 2]]
    like = [[0]] * 6  # two samples, three rows each
    assert op("expand", [7], like, attrs={"shape": [-2, 1], "batch": [1, 0, 3]}) == [[7]] * 4
    assert op("expand", [7], attrs={"shape": [2], "batch": None}) == [7, 7]


@pytest.mark.parametrize(
    ("mode", "pair", "expected"),
    [
        ("constant", [1, 2], [9, 1, 2, 3, 9, 9]),
        ("constant", [-1, 1], [2, 3, 9]),
        ("replicate", [2, 1], [1, 1, 1, 2, 3, 3]),
        ("circular", [1, 3], [3, 1, 2, 3, 1, 2, 3]),
        ("reflect", [2, 1], [3, 2, 1, 2, 3, 2]),
        ("reflect", [1, -2], [2, 1]),
    ],
)
def test_pad(mode: str, pair: list[int], expected: list[int]) -> None:
    attrs = {"padding": [[0, 0], pair], "mode": mode, "value": 9 if mode == "constant" else 0}
    assert op("pad", [[1, 2, 3]], attrs=attrs) == [expected]


# -- images -------------------------------------------------------------------------------------------------------


def test_conv_transpose() -> None:
    attrs: dict[str, Any] = {"stride": [2], "padding": [[0, 0]], "dilation": [1], "groups": 1}
    consts = {"weight": [[[10, 1, 100]]], "bias": [5]}
    x = [[[1, 2]]]
    assert op("conv_transpose", x, attrs=attrs, consts=consts, dtype="int32") == [[[15, 6, 125, 7, 205]]]
    attrs["padding"] = [[1, -1]]
    assert op("conv_transpose", x, attrs=attrs, consts=consts, dtype="int32") == [[[6, 125, 7, 205, 5]]]
    attrs = {"stride": [1], "padding": [[0, 0]], "dilation": [2], "groups": 2}
    consts = {"weight": [[[1, 2]], [[3, 4]]], "bias": [0, 0]}
    expected = [[[1, 0, 2], [6, 0, 8]]]
    assert op("conv_transpose", [[[1], [2]]], attrs=attrs, consts=consts, dtype="int32") == expected


def test_resize() -> None:
    x = [[[[1, 2], [3, 4]]]]
    consts = {"index0": [1, 0], "index1": [0, 0, 1]}
    assert op("resize_nearest", x, consts=consts) == [[[[3, 3, 4], [1, 1, 2]]]]
    weights = {"weight0": [[2, 0], [1, 1]], "weight1": [[2, 0], [-1, 3]]}
    assert op("resize_linear", x, attrs={"bits": 1, **FULL}, consts=weights) == [[[[1, 2], [2, 4]]]]  # 1, 2.5; 2, 3.5


def sampled(mode: str, padding: str, unit: str, grid: list[Any], k: int = 1) -> Any:
    """Of the image [[0, 10], [20, 30]]; a code of the grid is 2^-k pixels. Batch and channel are left out."""
    attrs = {"mode": mode, "padding_mode": padding, "unit": unit, "bits": k}
    consts = {"multiplier": [1, 1], "shift": [0, 0]}
    return op("grid_sample", [[[[0, 10], [20, 30]]]], [grid], attrs=attrs, consts=consts)[0][0]


def test_grid_sample() -> None:
    """The middle of the image is (0.5, 0.5): one step of 2^-1 pixels from each pixel."""
    middle, right, outside = [0, 0], [1, 0], [3, -1]
    grid = [[middle, right, outside]]
    assert sampled("bilinear", "zeros", "corners", grid) == [[15, 20, 0]]
    assert sampled("bilinear", "border", "corners", grid) == [[15, 20, 10]]
    assert sampled("nearest", "zeros", "edges", grid) == [[0, 10, 0]]  # 0.5 goes to the even 0
    # displacements: of pixel (0, 0) by (0.5, 0), of (0, 1) by (-0.5, 0.5), of both pixels below by (0, 0)
    assert sampled("bilinear", "zeros", "pixels", [[[1, 0], [-1, 1]], [[0, 0], [0, 0]]]) == [[5, 15], [20, 30]]
    assert sampled("bilinear", "zeros", "corners", [[[2, 1]]]) == [[15]]  # column 1.5, row 1: half of 30


# -- tables -------------------------------------------------------------------------------------------------------


def test_int8_table() -> None:
    table = list(range(-128, 128))
    table[0], table[255] = 7, 9
    assert op("table", [-128, -1, 127], attrs=FULL, consts={"table": table}) == [7, -1, 9]


def segmented(x: list[int], symmetry: str, codes: list[int], extra: int = 0) -> Any:
    """Two segments: codes 0, 2, 4 (entries 0, 10, 11) and from 5 on every code (entries 20, 40, 41)."""
    about = {"symmetry": symmetry, "codes": codes, "extra_bits": extra}
    consts = {"table": [0, 10, 11, 20, 40, 41], "start": [0, 5], "step": [1, 0], "offset": [0, 3]}
    return op("table", x, attrs={"table": about, "lo": -30, "hi": 40}, consts=consts)


def test_int16_table() -> None:
    x = [-9, 0, 1, 2, 3, 4, 5, 6, 9]
    assert segmented(x, "none", [0, 7]) == [0, 0, 5, 10, 10, 11, 20, 40, 40]  # 3: 10.5 goes to 10; 9 reads 7, clamped
    assert segmented([-1, -5, -9], "odd", [0, 7]) == [-5, -20, -30]
    assert segmented([-1, -5, -9], "even", [0, 7]) == [5, 20, 40]
    assert segmented([2, 4, 7], "none", [0, 7], 2) == [2, 3, 10]  # 2.5, 2.75, 10.25


# -- factors ------------------------------------------------------------------------------------------------------


def test_lone_factor() -> None:
    assert lone_factor(0.5, 8) == (128, 8)
    assert lone_factor(-0.5, 8) == (-128, 8)
    assert lone_factor(2.0**-41, 20) == (0, 0)
    assert lone_factor(300.0, 8) == (255, 0)


def test_addend_factor() -> None:
    assert addend_factor(0.5, 2.0, 8) == (128, 512, 8)
    assert addend_factor(0.5, 1 + 2.0**-9, 8) == (128, 256, 8)  # 256.5 has 9 bits: rounded to 8
    assert addend_factor(2.0**-30, 1.0, 20) == (1, 2**30, 30)
    assert addend_factor(0.5, 2.0**-20, 8) == (128, 0, 8)


def test_sum_factor() -> None:
    x8 = (128, 128)
    assert sum_factor(0.5, -2.0, 8, x8, -128) == (128, -512, 8)
    assert sum_factor(2.0**-50, -0.5, 8, x8, -128) == (0, -128, 8)
    assert sum_factor(2.0**-50, 2.0**-60, 8, x8, -128) == (0, 0, 0)
    # a factor of 1000 saturates: 2 * (128 + 128 / 2) = 384 does what it does
    assert sum_factor(1000.0, 0.5, 8, x8, -128) == (384 * 2**8, 128, 8)
    # the shift of 2^-30 is 37; 2^30 * g stays below 2^31 for g = 1
    assert sum_factor(1.0, 2.0**-30, 8, x8, -128) == (2**30, 1, 30)
    assert sum_factor(2.0, 2.0, 8, x8, -128) == (128, 128, 6)


def test_slope_factors() -> None:
    assert signed_pair(0.5, -0.125, 8) == (128, -32, 8)
    assert signed_pair(0.5, 2.0, 8) == (32, 128, 6)
    assert signed_pair(1.0, 0.0, 8) == (128, 0, 7)
    assert signed_pair(0.75, -0.75, 8) == (192, -192, 8)
