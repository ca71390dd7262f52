"""Makers of transposed convolutions, resizes and samplers: see :mod:`tests.case_ops`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qatlib.qtype import QType
from tests.case_builder import Array, Builder, int32
from tests.case_ops import image, weighted
from tests.oracle import factor


def conv_transpose(b: Builder, x: str) -> str:
    """Random geometry; negative padding (an output padding) and padding that crops, as far as an element is left."""
    channels, *size = b.values[x].shape[1:]
    axes = []
    for n in size:
        k, s, d = b.pick(1, 2, 3, 4), b.between(1, 3), b.between(1, 2)
        full = (n - 1) * s + d * (k - 1) + 1
        before = b.between(-1, min(2, full - 1))
        after = b.between(-2, min(2, full - max(before, 0) - 1))
        axes.append((k, s, d, [before, after], full - before - after))
    kernel, stride, dilation, padding, out = (list(column) for column in zip(*axes, strict=True))
    groups = b.pick(*(g for g in range(1, channels + 1) if channels % g == 0))
    outs = groups * b.between(1, 3)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return weighted(b, "conv_transpose", x, (outs, channels // groups, *kernel), (-1, outs, *out), attrs)


def deep_image(b: Builder) -> str:
    """A small image, or one whose channels let an accumulator pass 2^24 or 2^31."""
    if b.pick(True, True, True, False):
        return image(b)
    return b.feed((b.pick(20, 100, 600), 2, b.between(1, 2)), b.qtype("int16"), b.pick("max", "min", "high"))


def resize_nearest(b: Builder, x: str) -> str:
    batch, channels, *size = b.values[x].shape
    index = [b.rng.integers(0, n, b.between(1, 9)) for n in size]
    consts = {f"index{i}": int32(positions) for i, positions in enumerate(index)}
    return b.emit("resize_nearest", [x], (batch, channels, *map(len, index)), b.values[x].qtype, {}, **consts)


def coefficients(b: Builder, n: int, out: int, k: int) -> Array:
    """``[out, n]`` whose rows sum to 2^k: one tap, two as of linear, four as of cubic; or two halves."""
    rows, halves = np.zeros((out, n), dtype=np.int64), b.pick(True, False)
    for row in rows:
        style = b.rng.integers(3)
        near = np.sort(b.rng.choice(n, min(n, (1, 2, 4)[style]), replace=False))
        if halves:
            row[near[0]] += 2 ** (k - 1)
            row[near[-1]] += 2 ** (k - 1)
            continue
        shares = b.rng.uniform(0, 1, len(near)) if style < 2 else np.array([-0.1, 0.7, 0.5, -0.1][: len(near)])
        row[near] = np.rint(shares / shares.sum() * 2**k) if style < 2 else np.rint(shares * 2**k)
        row[near[len(near) // 2]] += 2**k - row.sum()
    return rows


def resize_linear(b: Builder, x: str) -> str:
    batch, channels, *size = b.values[x].shape
    qtype = b.values[x].qtype
    k = 11 if qtype.dtype == "int8" else min(16, 36 // len(size))
    weights = [coefficients(b, n, b.between(1, 9), k) for n in size]
    consts = {f"weight{i}": int32(w.ravel()).reshape(w.shape) for i, w in enumerate(weights)}
    shape = (batch, channels, *(len(w) for w in weights))
    return b.emit("resize_linear", [x], shape, qtype, {"bits": k, **b.limits(qtype)}, **consts)


def grid_sample(b: Builder) -> str:
    """Positions inside, at the edges, outside, far outside, and on whole and half pixels."""
    height, width = b.between(1, 7), b.between(1, 7)
    x = b.feed((b.between(1, 4), height, width))
    unit, k = b.pick("pixels", "edges", "corners"), 10
    out = (b.between(1, 6), b.between(1, 6))
    half = {"pixels": (1.0, 1.0), "edges": (width / 2, height / 2), "corners": ((width - 1) / 2, (height - 1) / 2)}
    reach = b.pick(0.8, 1.3, 4.0) * (4.0 if unit == "pixels" else 1.0)
    scale = b.pick(reach / 32768, 2.0**-12, 2.0**-14)
    bits = b.bits()
    pairs = [factor(scale * h * 2**k, bits) if h else (0, 0) for h in half[unit]]
    grid = b.feed((*out, 2), QType("int16", scale))
    attrs = {"mode": b.pick("bilinear", "nearest"), "padding_mode": b.pick("zeros", "border"), "unit": unit, "bits": k}
    consts = {"multiplier": int32([m for m, _ in pairs]), "shift": int32([n for _, n in pairs])}
    return b.emit("grid_sample", [x, grid], (-1, b.values[x].shape[1], *out), b.values[x].qtype, attrs, **consts)


def adaptive_max_pool(b: Builder, x: str) -> str:
    batch, channels, *size = b.values[x].shape
    outs = [b.pick(1, 2, 3, n, n + 1) for n in size]
    attrs = {"output_size": outs}
    return b.emit("adaptive_max_pool", [x], (batch, channels, *outs), b.values[x].qtype, attrs)


KINDS: dict[str, Callable[[Builder], str]] = {
    "conv_transpose": lambda b: conv_transpose(b, deep_image(b)),
    "resize_nearest": lambda b: resize_nearest(b, image(b)),
    "resize_linear": lambda b: resize_linear(b, image(b)),
    "grid_sample": grid_sample,
    "adaptive_max_pool": lambda b: adaptive_max_pool(b, image(b)),
}
