"""Makers of ops that leave codes as they are: see :mod:`tests.case_ops`."""

from __future__ import annotations

import math
from collections.abc import Callable

from qatlib.qtype import INT32 as COUNTS
from tests.case_builder import Builder, Shape
from tests.case_ops import image


def anything(b: Builder, shape: Shape | None = None) -> str:
    """A feed of codes, truth values or integers without a scale; at least one axis besides the batch."""
    shape = shape or tuple(b.between(1, 6) for _ in range(b.between(1, 4)))
    make = b.pick(b.feed, b.feed, b.feed, b.feed_bool, b.feed_counts)
    return str(make(shape))


def resized(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def an_axis(b: Builder, x: str) -> int:
    """An axis of ``x`` other than the batch."""
    return b.between(1, len(b.values[x].shape) - 1)


def reshape(b: Builder, x: str) -> str:
    value = b.values[x]
    flat = math.prod(value.shape[1:])
    part = b.pick(*(d for d in range(1, flat + 1) if flat % d == 0))
    shape = b.pick((-1, flat), (-1, part, flat // part))
    return b.emit("reshape", [x], shape, value.qtype, {"shape": list(shape)})


def permute(b: Builder, x: str) -> str:
    value = b.values[x]
    dims = [0, *(1 + b.rng.permutation(len(value.shape) - 1)).tolist()]
    return b.emit("permute", [x], tuple(value.shape[d] for d in dims), value.qtype, {"dims": dims})


def cut(b: Builder, x: str) -> str:
    """A slice along one or several axes."""
    value = b.values[x]
    axes = sorted({an_axis(b, x) for _ in range(b.between(1, 3))})
    starts = [b.between(0, value.shape[a] - 1) for a in axes]
    stops = [b.between(start + 1, value.shape[a]) for start, a in zip(starts, axes, strict=True)]
    steps = [b.between(1, 3) for _ in axes]
    shape = value.shape
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        shape = resized(shape, axis, -(-(stop - start) // step))
    attrs = {"axes": axes, "starts": starts, "stops": stops, "steps": steps}
    return b.emit("slice", [x], shape, value.qtype, attrs)


def take(b: Builder, x: str) -> str:
    """Positions in any order, some more than once."""
    value, axis = b.values[x], an_axis(b, x)
    index = [b.between(0, value.shape[axis] - 1) for _ in range(b.between(1, 6))]
    return b.emit("take", [x], resized(value.shape, axis, len(index)), value.qtype, {"axis": axis, "index": index})


def gather(b: Builder, x: str) -> str:
    """By an int32 feed that may be shorter than ``x`` on other axes and of any length on its own."""
    value, axis = b.values[x], an_axis(b, x)
    shape = tuple(b.between(1, 7) if i == axis else b.between(1, size) for i, size in enumerate(value.shape) if i)
    index = b.feed_counts(shape, 0, value.shape[axis] - 1)
    return b.emit("gather", [x, index], b.values[index].shape, value.qtype, {"axis": axis})


def embedding(b: Builder) -> str:
    qtype, rows = b.qtype(), b.between(1, 9)
    table = b.constant((rows, *(b.between(1, 5) for _ in range(b.between(0, 2)))), qtype)
    ids = b.feed_counts(tuple(b.between(1, 5) for _ in range(b.between(0, 2))), 0, rows - 1)
    return b.emit("embedding", [table, ids], (*b.values[ids].shape, *b.values[table].shape[1:]), qtype)


def expand(b: Builder) -> str:
    """A feed to larger sizes; a constant to the batch of another value, or to k times that batch."""
    shape = tuple(b.between(1, 4) for _ in range(b.between(1, 3)))
    grown = tuple(b.pick(size, 5) if size == 1 else size for size in shape)
    if b.pick(True, False):
        x = anything(b, shape)
        return b.emit("expand", [x], (-1, *grown), b.values[x].qtype, {"shape": [-1, *grown], "batch": [0, 0, 1]})
    times = b.between(1, 3)
    like = b.feed((times, b.between(1, 3)))
    size = b.values[like].shape[2]
    like = b.emit("reshape", [like], (-times, size), b.values[like].qtype, {"shape": [-1, size]})
    target = b.between(1, 3)
    x = b.constant(b.pick((1, *shape), shape), b.qtype())
    attrs = {"shape": [-target, *grown], "batch": [1, 0, times]}
    return b.emit("expand", [x, like], (-target, *grown), b.values[x].qtype, attrs)


def pad(b: Builder, x: str) -> str:
    """Grows and crops, every mode; the batch stays."""
    value = b.values[x]
    mode = b.pick("constant", "constant", "reflect", "replicate", "circular")
    padding, shape = [[0, 0]], value.shape
    for axis, size in enumerate(value.shape[1:], 1):
        most = {"reflect": size - 1, "circular": size}.get(mode, 3)
        before = b.between(-(size - 1), min(3, most))
        after = b.between(-(size - 1 + min(before, 0)), min(3, most))
        padding.append([before, after])
        shape = resized(shape, axis, size + before + after)
    low, high = value.qtype.codes
    fill = b.pick(0, low, high, b.between(low, high)) if mode == "constant" else 0
    return b.emit("pad", [x], shape, value.qtype, {"padding": padding, "mode": mode, "value": fill})


def cat_untouched(b: Builder) -> str:
    """Of truth values, or of integers without a scale."""
    shape = tuple(b.between(1, 4) for _ in range(b.between(1, 3)))
    axis, make = b.between(1, len(shape)), b.pick(b.feed_bool, b.feed_counts)
    sizes = [b.between(1, 4) for _ in range(b.between(1, 3))]
    names = [make(resized((-1, *shape), axis, size)[1:]) for size in sizes]
    full = resized((-1, *shape), axis, sum(sizes))
    return b.emit("cat", names, full, b.values[names[0]].qtype, {"axis": axis})


def constant(b: Builder) -> str:
    """On its own, next to an input that brings the batch."""
    b.feed((1,))
    shape = tuple(b.between(1, 4) for _ in range(b.between(0, 3)))
    return b.constant(shape, b.pick(b.qtype(), COUNTS))


# -- positions ----------------------------------------------------------------------------------------------------


def ties(b: Builder) -> str:
    """A feed in which codes are often equal."""
    shape = tuple(b.between(1, 7) for _ in range(b.between(1, 3)))
    make: Callable[..., str] = b.pick(b.feed, b.feed, b.feed_counts)
    return b.feed(shape, pattern=b.pick("small", "uniform", "min", "sparse")) if make == b.feed else make(shape)


def arg_extremum(b: Builder, x: str) -> str:
    value, axis, keepdim = b.values[x], an_axis(b, x), b.pick(True, False)
    shape = resized(value.shape, axis, 1) if keepdim else (*value.shape[:axis], *value.shape[axis + 1 :])
    attrs = {"axis": axis, "keepdim": keepdim, "size": value.shape[axis]}
    return b.emit(b.pick("argmax", "argmin"), [x], shape, COUNTS, attrs)


def topk(b: Builder, x: str) -> str:
    value, axis = b.values[x], an_axis(b, x)
    k = b.between(1, value.shape[axis])
    attrs = {"axis": axis, "k": k, "largest": b.pick(True, False), "size": value.shape[axis]}
    return b.emit("topk", [x], resized(value.shape, axis, k), COUNTS, attrs)


KINDS: dict[str, Callable[[Builder], str]] = {
    "reshape": lambda b: reshape(b, image(b)),
    "permute": lambda b: permute(b, image(b)),
    "slice": lambda b: cut(b, anything(b)),
    "take": lambda b: take(b, anything(b)),
    "gather": lambda b: gather(b, anything(b)),
    "embedding": embedding,
    "expand": expand,
    "pad": lambda b: pad(b, anything(b)),
    "cat_untouched": cat_untouched,
    "constant": constant,
    "arg_extremum": lambda b: arg_extremum(b, ties(b)),
    "topk": lambda b: topk(b, ties(b)),
}
