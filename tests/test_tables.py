"""Tables: section "Tables" of docs/numerics.md. The reader and the errors are computed a second time here, in plain
Python and in NumPy float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qatlib.errors import ProgramError
from qatlib.pipeline.config import TableParams
from qatlib.qtype import QType, limits
from qatlib.tables import Source, Table, TableSpec, build

FULL = limits("int16")
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "exp": np.exp,
    "square": np.square,
    "sin": np.sin,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "shrink": lambda x: np.where(np.abs(x) > 0.7, x, 0.0),
}


def made(
    f: Callable[[Any], Any],
    reach: float = 4.0,
    out: str = "int16",
    codes: tuple[int, int] = FULL,
    observed: tuple[float, float] | None = None,
    peak: float | None = None,
    **spec: Any,
) -> tuple[Table, float, float]:
    """A table from int16 codes that span ``+-reach``, with the scales of input and output."""
    s_x = float(np.float32(reach / 32767.5))
    largest = peak or float(np.abs(f(np.arange(codes[0], codes[1] + 1) * s_x)).max())
    s_y = float(np.float32(2 * largest / np.subtract(*limits(out)[::-1])))
    source = Source(QType("int16", s_x), codes, observed)
    return build(f, source, QType(out, s_y), limits(out), TableSpec(**spec), "op"), s_x, s_y  # type: ignore[arg-type]


def by_hand(table: Table, code: int) -> int:
    """The contract's formula for one code, in Python integers and exact fractions."""
    constants = {role: part.tolist() for role, part in table.constants().items()}
    record = table.record()
    first, last = record["codes"]
    x = code if record["symmetry"] == "none" else abs(code)
    x = min(max(x, first), last)
    k = max(k for k, start in enumerate(constants["start"]) if start <= x)
    h = constants["step"][k]
    j = constants["offset"][k] + (x - constants["start"][k]) // 2**h
    frac = (x - constants["start"][k]) % 2**h
    y = constants["table"][j]
    if frac:
        y += round(Fraction((constants["table"][j + 1] - constants["table"][j]) * frac, 2**h))
    if record["symmetry"] == "odd" and code < 0:
        y = -y
    return min(max(round(Fraction(y, 2 ** record["extra_bits"])), table.lo), table.hi)


SOME = sorted({*range(-32768, 32768, 613), *range(-32768, -32760), *range(-9, 9), *range(32760, 32768)})


@pytest.mark.parametrize("out", ["int8", "int16"])
@pytest.mark.parametrize("division", ["uniform", "curvature", (-1.5, 0.3, 1.0)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_reading_is_the_written_formula(name: str, division: Any, out: str) -> None:
    symmetry = "none" if isinstance(division, tuple) else "auto"
    table, _, _ = made(FUNCTIONS[name], out=out, division=division, symmetry=symmetry, entries=300)
    expanded = table.expanded()
    assert [int(expanded[code + 32768]) for code in SOME] == [by_hand(table, code) for code in SOME]


@pytest.mark.parametrize("out", ["int8", "int16"])
@pytest.mark.parametrize("division", ["uniform", "curvature", "auto", (-1.5, 0.3, 1.0)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stored_error_is_the_error(name: str, division: Any, out: str) -> None:
    f = FUNCTIONS[name]
    table, s_x, s_y = made(f, out=out, division=division, symmetry="none")
    error = np.abs(table.expanded() - np.clip(f(np.arange(-32768, 32768) * s_x) / s_y, *limits(out)))
    record = table.record()
    assert record["worst_lsb"] == pytest.approx(error.max(), rel=1e-12)
    assert record["mean_lsb"] == pytest.approx(error.mean(), rel=1e-12)
    assert (table.lo, table.hi) == (table.expanded().min(), table.expanded().max())


@pytest.mark.parametrize("entries", [64, 512])
@pytest.mark.parametrize("division", ["uniform", "curvature", "auto", (0.5, 2.0)])
def test_the_budget_is_kept(division: Any, entries: int) -> None:
    for f in FUNCTIONS.values():
        table, _, _ = made(f, division=division, entries=entries, segments=8)
        segments = table.record()["segments"]
        assert segments <= 8
        assert entries / 4 < len(table.entries) <= entries + segments
        assert np.abs(table.entries).max() <= 32768
        # a product of the interpolation stays in 32 bits
        assert table.steps.max() <= 15


def test_auto_is_the_better_of_the_two() -> None:
    for name in ("tanh", "silu", "exp"):
        worst = {d: made(FUNCTIONS[name], division=d)[0].worst_lsb for d in ("uniform", "curvature", "auto")}
        assert worst["auto"] == min(worst["uniform"], worst["curvature"])


def test_curvature_puts_its_entries_where_the_function_bends() -> None:
    """1/x between 1/100 and 1 bends most at the left end; spread evenly, 512 entries miss it by hundreds of codes."""
    options: dict[str, Any] = {"reach": 1.0, "codes": (328, 32767)}
    even, _, _ = made(np.reciprocal, division="uniform", **options)
    curved, _, _ = made(np.reciprocal, division="curvature", **options)
    assert even.worst_lsb > 100
    assert curved.worst_lsb < 1.2
    assert curved.steps[:3].max() < 3
    assert curved.steps[-1] > 6


def test_a_jump_on_a_break_point_is_exact() -> None:
    table, s_x, s_y = made(lambda x: np.where(x < 1, -1.0, 0.5), division=(1.0,), symmetry="none", entries=4)
    x = np.arange(-32768, 32768) * s_x
    assert np.abs(table.expanded() - np.where(x < 1, -1.0, 0.5) / s_y).max() <= 0.5
    uniform, _, _ = made(lambda x: np.where(x < 1, -1.0, 0.5), division="uniform", symmetry="none", entries=4)
    assert uniform.worst_lsb > 1000


@pytest.mark.parametrize("out", ["int8", "int16"])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "exp"])
@pytest.mark.parametrize("division", ["uniform", "curvature"])
def test_monotonic_functions_stay_monotonic(name: str, division: str, out: str) -> None:
    table, _, _ = made(FUNCTIONS[name], reach=8.0, out=out, division=division)
    assert (np.diff(table.expanded()) >= 0).all()


@pytest.mark.parametrize(("name", "kind"), [("tanh", "odd"), ("sin", "odd"), ("square", "even"), ("sigmoid", "none")])
def test_symmetry_stores_one_half(name: str, kind: str) -> None:
    table, _, _ = made(FUNCTIONS[name])
    expanded = table.expanded()
    assert table.symmetry == kind
    if kind == "none":
        return
    sign = -1 if kind == "odd" else 1
    assert (expanded[1:32768][::-1] == sign * expanded[32769:]).all()
    assert table.starts.min() == 0
    whole, _, _ = made(FUNCTIONS[name], division="uniform", symmetry="none")
    half, _, _ = made(FUNCTIONS[name], division="uniform", symmetry=kind)
    assert half.steps[0] == whole.steps[0] - 1
    assert half.worst_lsb <= whole.worst_lsb


@pytest.mark.parametrize("out", ["int8", "int16"])
def test_an_odd_table_saturates_on_both_sides(out: str) -> None:
    table, _, _ = made(np.tanh, out=out, peak=0.5)
    lo, hi = limits(out)
    assert (table.hi, table.lo) == (hi, lo if out == "int8" else lo + 1)
    assert table.worst_lsb < 1.1 or out == "int16"


def test_eight_bit_outputs_carry_extra_bits() -> None:
    """With 8 bits of fraction in the entries, a table is as good as rounding f itself, but for 2^-8 of a code."""
    table, _, _ = made(FUNCTIONS["sigmoid"], out="int8")
    assert table.extra_bits == 8
    assert table.worst_lsb < 0.5 + 2 / 256
    small, _, _ = made(FUNCTIONS["sigmoid"], out="int8", peak=10.0)  # codes up to 13 leave room for more
    assert small.extra_bits == 11
    assert np.abs(small.entries).max() > 2**14


@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    codes=st.tuples(st.integers(-32768, 32767), st.integers(-32768, 32767)).map(sorted),
    reach=st.floats(2.0**-10, 20.0),
    peak=st.floats(0.01, 100.0),
    out=st.sampled_from(["int8", "int16"]),
    division=st.sampled_from(["uniform", "curvature", "auto"]),
    segments=st.integers(1, 20),
    entries=st.integers(2, 300),
    span=st.none() | st.tuples(st.floats(-0.9, 0.0), st.floats(0.01, 0.9)),
)
@settings(max_examples=60, deadline=None)
def test_any_table_is_read_as_written_and_knows_its_error(
    name: str, codes: list[int], reach: float, peak: float, out: str, span: Any, **spec: Any
) -> None:
    f, (first, last) = FUNCTIONS[name], codes
    clamp = None
    if span is not None:  # within the codes
        low, high = (float(np.float32(reach / 32767.5)) * (first + (last - first) * (0.5 + end / 2)) for end in span)
        clamp = (low, max(high, low + 1e-3))
    table, s_x, s_y = made(f, reach, out, (first, last), peak=peak, range=clamp, **spec)
    x = np.arange(first, last + 1)
    want = f(np.clip(x * s_x, *(clamp or (-math.inf, math.inf)))) / s_y
    error = np.abs(table(x) - np.clip(want, *limits(out)))
    assert table.worst_lsb == pytest.approx(error.max(), rel=1e-12)
    some = [first, last, *np.linspace(first, last, 40).astype(int).tolist()]
    assert [int(table(np.array([code]))[0]) for code in some] == [by_hand(table, code) for code in some]
    assert (table.steps >= 0).all()
    assert len(table.entries) <= spec["entries"] + len(table.starts)
    assert len(table.starts) <= spec["segments"]


# -- 8-bit inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["int8", "int16"])
@pytest.mark.parametrize("s_x", [2.0**-20, 2.0**-7, 0.031, 2.0**6])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "sin", "square"])
def test_eight_bit_inputs_are_exact(name: str, s_x: float, out: str) -> None:
    f, s_x = FUNCTIONS[name], float(np.float32(s_x))
    with np.errstate(over="ignore"):  # of exp, in the sigmoid at -8192
        s_y = float(np.float32(max(np.abs(f(np.arange(-128, 128) * s_x))) / 100))
        table = build(f, Source(QType("int8", s_x), (-128, 127)), QType(out, s_y), limits(out), TableSpec(), "op")  # type: ignore[arg-type]
        want = [min(max(round(float(f(q * s_x) / s_y)), limits(out)[0]), limits(out)[1]) for q in range(-128, 128)]
    assert table.expanded().tolist() == want
    assert table.record()["division"] == "exact"
    assert table.worst_lsb <= 0.5


def test_the_output_clamp_cuts() -> None:
    table = build(np.exp, Source(QType("int8", 0.05), (-128, 127)), QType("int8", 0.05), (3, 60), TableSpec(), "op")
    assert (table.lo, table.hi) == (3, 60)
    assert table.worst_lsb <= 0.5  # against the clamped function


# -- input range -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_where_f_is_not_finite_the_calibrated_range_clamps(dtype: str) -> None:
    lo, hi = limits(dtype)
    s_x, s_y = 4 / hi, 4 / 32767
    source = Source(QType(dtype, s_x), (lo, hi), observed=(0.3, 3.7))  # type: ignore[arg-type]
    table = build(np.log, source, QType("int16", s_y), FULL, TableSpec(), "op")
    assert table.record()["range"] == pytest.approx([0.3, 3.7], abs=s_x / 2)
    x = np.arange(lo, hi + 1) * source.qtype.scale  # type: ignore[operator]
    low, high = table.record()["range"]
    error = np.abs(table.expanded() - np.log(np.clip(x, low, high)) / QType("int16", s_y).scale)  # type: ignore[operator]
    assert error.max() == pytest.approx(table.worst_lsb)
    assert error.max() < 1.1


def test_a_calibrated_end_reaches_the_code_that_it_is_quantized_to() -> None:
    """Codes that calibration data make are not clamped, unless the function has no value there."""
    options: dict[str, Any] = {"out": QType("int8", 0.1), "clamp": limits("int8"), "spec": TableSpec(), "where": "op"}
    for low, end in ((0.29, 0.2), (0.31, 0.31), (0.09, 0.09)):  # codes 1, 2 and 0
        table = build(np.log, Source(QType("int8", 0.2), (-128, 127), (low, 5.09)), **options)
        assert table.record()["range"] == pytest.approx([end, 5.09])
    table = build(np.log, Source(QType("int8", 0.2), (-128, 127), (1.0, 5.11)), **options)
    assert table.record()["range"] == pytest.approx([1.0, 5.2])


def test_where_f_is_finite_on_every_code_nothing_clamps() -> None:
    assert made(np.sqrt, codes=(0, 32767), observed=(0.5, 1.0))[0].range is None
    assert made(np.exp, observed=(0.5, 1.0))[0].range is None


def test_a_range_by_hand_clamps_too() -> None:
    table, s_x, s_y = made(np.exp, range=(-1.0, 0.5))
    want = np.exp(np.clip(np.arange(-32768, 32768) * s_x, -1, 0.5)) / s_y
    assert np.abs(table.expanded() - want).max() == pytest.approx(table.worst_lsb)
    assert table.worst_lsb < 0.6  # all entries are where the function is
    assert table.record()["range"] == [-1.0, 0.5]


@pytest.mark.parametrize(
    ("f", "observed", "what"),
    [
        (np.log, (0.0, 2.0), "the function is -inf at 0, inside the calibrated input range [0, 2]"),
        (np.reciprocal, (-1.0, 1.0), "is inf at 0, inside the calibrated input range [-1, 1]"),
        (np.sqrt, (-0.1, 1.0), "is nan at -0.1, inside the calibrated"),
        (np.log, None, "is nan at -4.00006, inside the quantized"),
    ],
)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_a_function_that_is_not_finite_is_refused(dtype: str, f: Any, observed: Any, what: str) -> None:
    lo, hi = limits(dtype)
    source = Source(QType(dtype, float(np.float32(4 / 32767.5 * 32767.5 / (hi + 0.5)))), (lo, hi), observed)  # type: ignore[arg-type]
    with pytest.raises(ProgramError) as raised:
        build(f, source, QType("int8", 0.1), limits("int8"), TableSpec(), "head.log")
    error = raised.value
    assert error.code == "QAT210"
    assert error.where == "head.log"
    assert what.split(" at ")[0] in error.seen
    if dtype == "int16":
        assert what in error.seen
    assert "convert.tables" in error.fix


def test_a_hand_given_range_that_does_not_help_is_refused() -> None:
    with pytest.raises(ProgramError, match="QAT210 op: the function is nan at -1, inside the given input range"):
        made(np.log, peak=3.0, range=(-1.0, 2.0))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "seen"),
    [
        ({"division": "logarithmic"}, "division 'logarithmic'"),
        ({"division": ()}, "division ()"),
        ({"division": (1.0, 0.5)}, "division (1.0, 0.5)"),
        ({"division": (math.nan,)}, "division (nan,)"),
        ({"segments": 0}, "segments 0"),
        ({"entries": 1}, "entries 1"),
        ({"entries": 2**17}, "entries 131072"),
        ({"division": (1.0, 2.0, 3.0), "entries": 3}, "entries 3"),
        ({"range": (1.0, 1.0)}, "range [1.0, 1.0]"),
        ({"range": (0.0, math.inf)}, "range [0.0, inf]"),
        ({"symmetry": "skew"}, "symmetry 'skew'"),
    ],
)
def test_illegal_settings(spec: dict[str, Any], seen: str) -> None:
    with pytest.raises(ProgramError) as raised:
        TableSpec(**spec)
    assert (raised.value.code, raised.value.seen) == ("QAT211", seen)


def test_settings_in_params_yaml() -> None:
    record = TableParams.model_validate({"match": "a", "division": [-1, 0.5], "range": [-2, 2], "symmetry": "none"})
    assert record.spec == TableSpec(division=(-1.0, 0.5), range=(-2.0, 2.0), symmetry="none")
    assert TableParams(match="a").spec == TableSpec()


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"division": "logarithmic"}, "division 'logarithmic': Use uniform, curvature, auto"),
        ({"division": [1, "x"]}, r"division \[1, 'x'\]: Use"),
        ({"division": []}, r"division \(\): Use"),
        ({"range": [1.0]}, r"range \[1.0\]: Give"),
        ({"entries": 0}, "entries 0: Use 2 to 65536"),
    ],
)
def test_illegal_settings_in_params_yaml(wrong: dict[str, Any], seen: str) -> None:
    with pytest.raises(ValidationError, match=seen):
        TableParams.model_validate({"match": "a", **wrong})


@pytest.mark.parametrize(("name", "asked"), [("sigmoid", "odd"), ("exp", "even"), ("tanh", "even")])
def test_a_symmetry_that_f_lacks(name: str, asked: str) -> None:
    with pytest.raises(ProgramError, match=f"QAT212 op: is not {asked}"):
        made(FUNCTIONS[name], symmetry=asked)
    with pytest.raises(ProgramError, match="QAT212"):
        made(np.tanh, symmetry="odd", range=(-1.0, 2.0))


@pytest.mark.parametrize("spec", [{"range": (5.0, 9.0)}, {"division": (5.0,)}, {"division": (0.1, 0.1 + 1e-9)}])
def test_a_range_or_break_point_outside_of_the_codes(spec: dict[str, Any]) -> None:
    with pytest.raises(ProgramError, match="QAT213"):
        made(np.exp, **spec)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_constants_and_attributes_hold_the_whole_table(dtype: str) -> None:
    lo, hi = limits(dtype)
    source = Source(QType(dtype, 4 / hi), (lo, hi))  # type: ignore[arg-type]
    table = build(np.tanh, source, QType("int16", 1 / 30000), FULL, TableSpec(), "op")
    again = Table.read({"lo": table.lo, "hi": table.hi, "table": table.record()}, table.constants())
    assert (again.expanded() == table.expanded()).all()
    assert again.record() == table.record()
    roles = {role: part.dtype for role, part in table.constants().items()}
    small = {"table": np.dtype("int16")}
    assert roles == (
        small if dtype == "int8" else small | dict.fromkeys(("start", "step", "offset"), np.dtype("int32"))
    )
    assert sum(part.nbytes for part in table.constants().values()) < 2000
