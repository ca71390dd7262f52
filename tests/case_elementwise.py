"""Makers of ops that meet element by element: see :mod:`tests.case_ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qatlib.qtype import BOOL, QType
from qatlib.qtype import INT32 as COUNTS
from tests.case_builder import INT32, Builder, Shape, int32
from tests.case_ops import every_code
from tests.oracle import compare_factors


def reach(b: Builder, name: str) -> float:
    """Largest magnitude of the codes of value ``name``."""
    return float(-b.values[name].qtype.limits[0])


def shuffled(b: Builder, x: str, other: str) -> list[str]:
    return [x, other] if b.pick(True, False) else [other, x]


def add(b: Builder, x: str) -> str:
    other, shape = b.partner(x)
    pair, qtype = shuffled(b, x, other), b.qtype(b.pick("int8", "int16", "int16"))
    return b.emit("add", pair, shape, qtype, b.limits(qtype), **b.sum_factors(pair, qtype))


def mul(b: Builder, x: str) -> str:
    other, shape = b.partner(x)
    pair, qtype = shuffled(b, x, other), b.qtype(b.pick("int8", "int16", "int16"))
    factors = b.lone_factors([reach(b, x) * reach(b, other)], qtype)
    return b.emit("mul", pair, shape, qtype, b.limits(qtype), **factors)


def extremum(b: Builder, x: str) -> str:
    """The larger or smaller of two, each rescaled."""
    other, shape = b.partner(x)
    pair, qtype = shuffled(b, x, other), b.qtype(b.pick("int8", "int16", "int16"))
    factors = b.lone_factors([reach(b, name) for name in pair], qtype)
    return b.emit(b.pick("maximum", "minimum"), pair, shape, qtype, b.limits(qtype), **factors)


def sign(b: Builder, x: str) -> str:
    return b.emit(b.pick("neg", "abs"), [x], b.values[x].shape, b.values[x].qtype)


def clamp(b: Builder, x: str) -> str:
    value = b.values[x]
    return b.emit("clamp", [x], value.shape, value.qtype, b.limits(value.qtype))


def prelu(b: Builder, x: str) -> str:
    """One slope, or one per channel."""
    value, qtype = b.values[x], b.qtype()
    count = value.shape[1] if b.pick(True, False) else 1
    factors = b.slope_factors(count, reach(b, x), qtype)
    return b.emit("prelu", [x], value.shape, qtype, b.limits(qtype), **factors)


# -- truth values and integers without a scale --------------------------------------------------------------------


def small_shape(b: Builder) -> Shape:
    return tuple(b.between(1, 5) for _ in range(b.between(0, 3)))


def scaled_pair(b: Builder) -> tuple[list[str], Shape]:
    """Two inputs to compare; their scales are equal, apart by a power of two or a small ratio, or anything."""
    first = b.qtype()
    ratio = b.pick(1.0, 2.0, 0.25, 1.5, 256.0, 2.0 ** b.rng.uniform(-20, 20), 2.0**26, 2.0**-26)
    second = QType(b.pick("int8", "int16"), float(np.float32(first.scale * ratio)))
    x = b.feed(small_shape(b), first)
    other, shape = b.partner(x, second)
    return shuffled(b, x, other), shape


def counts_pair(b: Builder) -> tuple[list[str], Shape]:
    """Two int32 inputs, of which some elements are equal, or an int32 and an input with a scale."""
    shape = small_shape(b)
    high = b.pick(3, 1000, INT32 - 1)
    x = b.feed_counts(shape, -high, high)
    other = b.feed_counts(shape, -high, high) if b.pick(True, True, False) else b.feed(shape)
    return shuffled(b, x, other), b.values[x].shape


def compare(b: Builder) -> str:
    pair, shape = scaled_pair(b) if b.pick(True, True, False) else counts_pair(b)
    first, second = (b.values[name].qtype.scale for name in pair)
    mantissa, exponent = compare_factors((first, second))
    function = b.pick("gt", "ge", "lt", "le", "eq", "ne")
    consts = {"mantissa": int32(mantissa), "exponent": int32(exponent)}
    return b.emit("compare", pair, shape, BOOL, {"function": function}, **consts)


def logical(b: Builder) -> str:
    function, shape = b.pick("not", "and", "or", "xor"), small_shape(b)
    names = [b.feed_bool(shape) for _ in range(1 if function == "not" else 2)]
    return b.emit("logical", names, b.values[names[0]].shape, BOOL, {"function": function})


def where(b: Builder, x: str) -> str:
    """Branches are tensors or codes, at most one of them a code; the condition may have sizes of 1."""
    shape, qtype = b.values[x].shape, b.qtype(b.pick("int8", "int16", "int16"))
    condition = b.feed_bool(tuple(b.pick(size, size, 1) for size in shape[1:]))
    code = int(b.rng.integers(qtype.limits[0], qtype.limits[1] + 1))
    true, false = b.pick((None, None), (code, None), (None, code))
    tensors = [x]
    if true is None and false is None:
        other, shape = b.partner(x)
        tensors = shuffled(b, x, other)
    factors = b.lone_factors([reach(b, name) for name in tensors], qtype)
    attrs = {"true": true, "false": false, **full(qtype)}
    return b.emit("where", [condition, *tensors], shape, qtype, attrs, **factors)


def cast(b: Builder) -> str:
    """Truth values or int32 to codes, or truth values to int32."""
    shape, goal = small_shape(b), b.pick("codes", "codes", "int32")
    if goal == "int32":
        x = b.feed_bool(shape)
        return b.emit("cast", [x], b.values[x].shape, COUNTS, full(COUNTS))
    qtype = QType(b.pick("int8", "int16"), b.pick(1.0, 2.0, 4.0, b.qtype().scale))
    high = b.pick(1, 100, 2**17, INT32 - 1)
    x = b.feed_bool(shape) if high == 1 else b.feed_counts(shape, -high, high)
    return b.emit("cast", [x], b.values[x].shape, qtype, b.limits(qtype))


def counts(b: Builder) -> str:
    """Arithmetic on integers without a scale, up to where it saturates; sums with weights."""
    kind = b.pick("add", "add", "mul", "maximum", "minimum", "neg", "abs", "where", "clamp")
    shape, high = small_shape(b), b.pick(5, 2**20, INT32 - 1)
    x, other = (b.feed_counts(shape, -high - 1, high) for _ in range(2))
    shape = b.values[x].shape
    if kind in ("neg", "abs"):
        return b.emit(kind, [x], shape, COUNTS)
    if kind == "clamp":
        low = b.between(-high, high)
        return b.emit(kind, [x], shape, COUNTS, {"lo": low, "hi": b.between(low, high)})
    if kind == "where":
        condition, code = b.feed_bool(shape[1:]), b.between(-high, high)
        attrs = {"true": b.pick(None, code), "false": None, **full(COUNTS)}
        tensors = [x, other] if attrs["true"] is None else [x]
        return b.emit(kind, [condition, *tensors], shape, COUNTS, attrs, **whole(len(tensors)))
    weights = (b.pick(1, -1, 3), b.pick(1, -1, 2, -1000)) if kind == "add" else (1,) * (1 if kind == "mul" else 2)
    consts = {"multiplier": int32(weights), "shift": int32([0] * (1 if kind == "add" else len(weights)))}
    return b.emit(kind, [x, other], shape, COUNTS, full(COUNTS), **consts)


def full(qtype: QType) -> dict[str, int]:
    lo, hi = qtype.limits
    return {"lo": lo, "hi": hi}


def whole(terms: int) -> dict[str, Any]:
    """Factors that leave integers as they are."""
    return {"multiplier": int32([1] * terms), "shift": int32([0] * terms)}


KINDS: dict[str, Callable[[Builder], str]] = {
    "add": lambda b: add(b, every_code(b)),
    "mul": lambda b: mul(b, every_code(b)),
    "extremum": lambda b: extremum(b, every_code(b)),
    "sign": lambda b: sign(b, every_code(b)),
    "clamp": lambda b: clamp(b, every_code(b)),
    "prelu": lambda b: prelu(b, every_code(b)),
    "where": lambda b: where(b, every_code(b)),
    "compare": compare,
    "logical": logical,
    "cast": cast,
    "counts": counts,
}
