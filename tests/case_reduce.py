"""Makers of reductions and products of two activations: see :mod:`tests.case_ops`."""

from __future__ import annotations

import math
from collections.abc import Callable

from qatlib.qtype import INT32 as COUNTS
from tests.case_builder import EXTREMES, Builder, Shape
from tests.case_elementwise import reach
from tests.case_ops import every_code, image


def some_axes(b: Builder, x: str) -> list[int]:
    rank = len(b.values[x].shape)
    return sorted({b.between(1, rank - 1) for _ in range(b.between(1, rank))})


def reduced(shape: Shape, axes: list[int], keepdim: bool) -> Shape:
    if keepdim:
        return tuple(1 if i in axes else size for i, size in enumerate(shape))
    return tuple(size for i, size in enumerate(shape) if i not in axes)


def long_input(b: Builder) -> str:
    """A small image, one with every code, or rows whose sum passes 2^24 or 2^31."""
    size = b.pick("small", "small", "every", "2^24", "2^31")
    if size == "small":
        return image(b)
    if size == "every":
        return every_code(b)
    b.batch = 1
    qtype = b.qtype("int16")
    return b.feed((b.between(600, 900) if size == "2^24" else 70_000, 2), qtype, b.pick(*EXTREMES))


def total(b: Builder, x: str) -> str:
    """A sum, a mean, or a sum with another divisor."""
    value, keepdim = b.values[x], b.pick(True, False)
    axes = [1] if value.shape[1] > 500 else some_axes(b, x)
    count = math.prod(value.shape[a] for a in axes)
    bound, qtype = reach(b, x) * count, b.qtype()
    divisor = b.pick(1, count, max(1, count - 1))
    attrs = {"axes": axes, "keepdim": keepdim, "divisor": divisor, "acc_bound": int(bound), **b.limits(qtype)}
    return b.emit("sum", [x], reduced(value.shape, axes, keepdim), qtype, attrs, **b.one_factor(bound, qtype))


def total_of_counts(b: Builder) -> str:
    """Of truth values, or of integers that may saturate."""
    shape = tuple(b.between(1, 6) for _ in range(b.between(1, 3)))
    x, high = (b.feed_bool(shape), 1) if b.pick(True, False) else (b.feed_counts(shape), 2**31)
    axes, keepdim = some_axes(b, x), b.pick(True, False)
    bound = high * math.prod(b.values[x].shape[a] for a in axes)
    attrs = {"axes": axes, "keepdim": keepdim, "acc_bound": bound}
    return b.emit("sum", [x], reduced(b.values[x].shape, axes, keepdim), COUNTS, attrs)


def extreme(b: Builder, x: str) -> str:
    axes, keepdim = some_axes(b, x), b.pick(True, False)
    value = b.values[x]
    attrs = {"axes": axes, "keepdim": keepdim}
    return b.emit(b.pick("amax", "amin"), [x], reduced(value.shape, axes, keepdim), value.qtype, attrs)


def matmul(b: Builder) -> str:
    """Two feeds, or a feed and a constant of fewer axes; axes before the last two may be 1 on one side."""
    size = b.pick("small", "small", "small", "2^24", "wide")
    inner = {"small": b.between(1, 9), "2^24": b.between(1000, 1400), "wide": b.between(5000, 6000)}[size]
    rows, columns = b.between(1, 5), b.between(1, 5)
    lead = tuple(b.between(1, 3) for _ in range(b.between(0, 2)))
    pattern = b.pick(None, "small") if size == "small" else b.pick(*EXTREMES)
    names = []
    fixed = b.pick(None, None, 0, 1)
    for i, sizes in enumerate([(rows, inner), (inner, columns)]):
        outer = tuple(b.pick(n, n, 1) for n in lead)
        made = b.constant(sizes, b.qtype()) if i == fixed else b.feed((*outer, *sizes), pattern=pattern)
        names.append(made)
    left, right = names
    shapes = [b.values[name].shape[1:-2] for name in (left, right) if b.values[name].shape[0] == -1]
    outer = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    wide = [b.values[name].qtype.dtype == "int16" for name in names]
    drop = [b.pick(0, b.between(0, 8)) if is_wide and pattern != "small" else 0 for is_wide in wide]
    bound, qtype = reach(b, left) * reach(b, right) * inner / 2 ** sum(drop), b.qtype()
    attrs = {"factor": 1.0, "drop": drop, "acc_bound": int(bound), **b.limits(qtype)}
    likely = 4 * inner if pattern == "small" else bound  # codes -2 to 2 meet ties
    return b.emit("matmul", names, (-1, *outer, rows, columns), qtype, attrs, **b.one_factor(likely, qtype))


KINDS: dict[str, Callable[[Builder], str]] = {
    "sum": lambda b: total(b, long_input(b)),
    "sum_of_counts": total_of_counts,
    "extreme": lambda b: extreme(b, every_code(b)),
    "matmul": matmul,
}
