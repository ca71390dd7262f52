"""One maker per kind of Program op: draws the geometry, weights and factors, and appends the op to a Builder.

Shapes stay small except where the accumulator has to pass 2^24 (int8: 1,024 products; int16: 4) or 2^31 (int8: 131,072;
int16: 512), so that every route of section 6 of ``docs/numerics.md`` is taken.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from qatlib.qtype import FLOAT, QType, limits
from qatlib.qtype import INT32 as ACCUMULATOR
from tests.case_builder import EXTREMES, INT32, PATTERNS, Array, Builder, Shape, codes, hard_accumulators, int32
from tests.oracle import addend_factor, sum_factor


def image(b: Builder, rank: int | None = None) -> str:
    """A feed ``[N, C, *in]`` with 1 to 3 spatial axes."""
    rank = rank or b.between(1, 3)
    return b.feed((b.between(1, 6), *(b.between(1, 7) for _ in range(rank))))


def every_code(b: Builder) -> str:
    """A small image, or one in which every code of its format occurs, large enough to be requantized in pieces."""
    if b.pick(True, True, False):
        return image(b)
    qtype = b.qtype(b.pick("int8", "int16", "int16"))
    b.batch, side = 5, 16 if qtype.dtype == "int8" else 256
    return b.feed((1, side, side), qtype, "ramp")


# -- conv and linear ----------------------------------------------------------------------------------------------


def conv_input(b: Builder) -> str:
    size = b.pick("small", "small", "small", "dense", "wide", "saturating")
    if size == "small":
        return image(b)
    if size == "dense":
        b.batch = 16
        return b.feed((16, 8, 8))
    qtype = b.qtype("int16" if size == "saturating" else None)
    channels = b.between(600, 700) if size == "saturating" else b.between(2000, 3000)
    return b.feed((channels, 2, 1), qtype, b.pick(*EXTREMES))


def axis_geometry(b: Builder, size: int) -> tuple[int, int, list[int], int, int]:
    """Kernel, stride, padding, dilation and output size of one axis; the kernel fits the padded input."""
    kernel, stride, dilation = b.pick(1, 2, 3, 3, 5), b.between(1, 3), b.between(1, 3)
    before, after = b.between(0, 2), b.between(0, 2)
    if dilation * (kernel - 1) + 1 > size + before + after:
        kernel = 1
    out = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    return kernel, stride, [before, after], dilation, out


def conv(b: Builder, x: str) -> str:
    """Random geometry and groups on ``x``; the output is codes, codes with an addend, or int32."""
    channels, *size = b.values[x].shape[1:]
    wide = channels > 100
    axes = [(1, 1, [0, 0], 1, n) if wide else axis_geometry(b, n) for n in size]
    kernel, stride, padding, dilation, out = (list(column) for column in zip(*axes, strict=True))
    groups = 1 if wide else b.pick(*(g for g in range(1, channels + 1) if channels % g == 0))
    outs = 16 if channels == 16 else groups * b.between(2, 3)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return weighted(b, "conv", x, (outs, channels // groups, *kernel), (-1, outs, *out), attrs)


def linear_input(b: Builder) -> str:
    size = b.pick("small", "small", "small", "small", "wide", "saturating")
    if size == "small":
        return b.feed((*(b.between(1, 4) for _ in range(b.between(0, 2))), b.between(1, 9)))
    if size == "wide":
        return b.feed((b.between(2000, 3000),), pattern=b.pick(*EXTREMES))
    b.batch = 1
    qtype = b.qtype(b.pick("int8", *["int16"] * 4))
    return b.feed((132_000 if qtype.dtype == "int8" else 600,), qtype, b.pick(*EXTREMES))


def linear(b: Builder, x: str) -> str:
    *lead, ins = b.values[x].shape
    outs = b.between(2, 4)
    return weighted(b, "linear", x, (outs, ins), (*lead, outs), {})


def weighted(b: Builder, kind: str, x: str, weight_shape: Shape, shape: Shape, attrs: dict[str, Any]) -> str:
    """Weight, bias and output stage of a conv or linear. A bias next to a half has no or few weights to disturb it."""
    pattern = b.pick("zero", "random", "near 2^24", "extreme", *["half"] * 6)
    patterns = EXTREMES if weight_shape[1] > 100 else PATTERNS
    dtype = b.pick("int8", "int8", "int8", "int16")
    weight = codes(b.rng, b.pick(*patterns), weight_shape, *limits(dtype))
    if pattern == "half":
        weight = weight * (b.rng.random(weight_shape) < 0.1)
        weight[::2] = 0
    top = -b.values[x].qtype.limits[0]
    sums = np.abs(weight).reshape(len(weight), -1).sum(axis=1) * top
    reaches = [float(s) for s in sums + (2**22 if pattern == "half" else 0)]
    stage = b.pick("codes", "codes", "codes", "addend", "int32")
    qtype = ACCUMULATOR if stage == "int32" else b.qtype()
    inputs, consts, m, n = [x], {}, None, None
    if stage == "addend":
        inputs.append(b.feed(shape[1:]))
        reach = float(-b.values[inputs[1]].qtype.limits[0])
        m, m2, n = b.addend_factors(reaches, reach, qtype.limits[1])
        consts = {"multiplier": int32(m), "addend_multiplier": int32(m2), "shift": int32(n)}
    elif stage == "codes":
        m, n = b.factors(reaches, qtype.limits[1])
        consts = {"multiplier": int32(m), "shift": int32(n)}
    bias = biases(b, pattern, len(weight), m, n, qtype)
    attrs |= {} if stage == "int32" else b.limits(qtype)
    attrs["acc_bound"] = int((sums + np.abs(bias)).max())
    consts |= {"weight": torch.from_numpy(weight.astype(dtype)), "bias": int32(bias)}
    return b.emit(kind, inputs, shape, qtype, attrs, **consts)


def biases(b: Builder, pattern: str, count: int, m: Array | None, n: Array | None, qtype: QType) -> Array:
    if pattern == "half" and m is not None and n is not None:
        return hard_accumulators(b.rng, m, n, *qtype.limits)
    if pattern == "zero":
        return np.zeros(count, dtype=np.int64)
    if pattern == "near 2^24":
        return b.rng.choice([-1, 1], count) * (2**24 + b.rng.integers(-3, 4, count))
    if pattern in ("extreme", "half"):
        return b.rng.choice([-1, 1], count) * (INT32 - 1 - b.rng.integers(0, 1000, count))
    return b.rng.integers(-(2**18), 2**18, count)


# -- sums and joints ----------------------------------------------------------------------------------------------


def dense_sum(b: Builder) -> str:
    """Of two int16 terms into int16 by 20-bit multipliers: many sums lie where float32 cannot decide."""
    kind, qtype = b.pick("add", "linear"), b.qtype("int16")
    lo, hi = qtype.limits
    x = b.feed((4096, 2), b.qtype("int16"), "uniform")
    other = b.feed((4096, 2), b.qtype("int16"), "uniform")
    reaches = [2.0**15, 2.0**15] if kind == "add" else [2.0**23, 2.0**15]
    r1, r2 = (hi * b.rng.uniform(0.2, 0.8) / reach for reach in reaches)
    clamp = {"lo": lo, "hi": hi}
    if kind == "add":
        m1, m2, n = sum_factor(r1, r2, 20, (2**15, 2**15), lo)
        return b.emit("add", [x, other], (-1, 4096, 2), qtype, clamp, multiplier=int32([m1, m2]), shift=int32(n))
    weight = torch.from_numpy(b.rng.integers(-128, 128, (2, 2)).astype(np.int8))
    m1, m2, n = addend_factor(r1, r2, 20)
    factors = {"multiplier": int32([m1] * 2), "addend_multiplier": int32([m2] * 2), "shift": int32([n] * 2)}
    attrs = {**clamp, "acc_bound": 2**23}
    return b.emit("linear", [x, other], (-1, 4096, 2), qtype, attrs, weight=weight, bias=int32([0, 0]), **factors)


def cat(b: Builder, x: str) -> str:
    shape = list(b.values[x].shape)
    axis = b.between(1, len(shape) - 1)
    sizes = [
        tuple(b.between(1, 4) if i == axis else s for i, s in enumerate(shape) if i) for _ in range(b.between(0, 2))
    ]
    names = [x, *(b.feed(size) for size in sizes)]
    shape[axis] = sum(b.values[name].shape[axis] for name in names)
    qtype = b.qtype(b.pick("int8", "int16", "int16"))
    m, n = b.factors([float(-b.values[name].qtype.limits[0]) for name in names], qtype.limits[1])
    return b.emit(
        "cat", names, tuple(shape), qtype, {"axis": axis, **b.limits(qtype)}, multiplier=int32(m), shift=int32(n)
    )


# -- pools --------------------------------------------------------------------------------------------------------


def max_pool(b: Builder, x: str) -> str:
    batch, channels, *size = b.values[x].shape
    axes = []
    for length in size:
        kernel, stride, (before, after), dilation, out = axis_geometry(b, length)
        starts = range(-before, -before + out * stride, stride)
        if any(all(not 0 <= s + k * dilation < length for k in range(kernel)) for s in starts):
            kernel, stride, before, after, dilation, out = 1, 1, 0, 0, 1, length
        axes.append((kernel, stride, [before, after], dilation, out))
    kernels, strides, padding, dilations, outs = (list(column) for column in zip(*axes, strict=True))
    attrs = {"kernel": kernels, "stride": strides, "padding": padding, "dilation": dilations}
    return b.emit("max_pool", [x], (batch, channels, *outs), b.values[x].qtype, attrs)


def avg_pool(b: Builder, x: str) -> str:
    batch, channels, *size = b.values[x].shape
    axes = []
    for length in size:
        kernel, stride = b.between(1, 4), b.between(1, 3)
        before, after = b.between(0, kernel // 2), b.between(0, 2)
        kernel = min(kernel, length + before + after)
        axes.append((kernel, stride, [before, after], (length + before + after - kernel) // stride + 1))
    kernels, strides, padding, outs = (list(column) for column in zip(*axes, strict=True))
    attrs = {"kernel": kernels, "stride": strides, "padding": padding}
    return mean(b, "avg_pool", x, (batch, channels, *outs), attrs, math.prod(kernels))


def adaptive_avg_pool(b: Builder, x: str) -> str:
    batch, channels, *size = b.values[x].shape
    outs = [b.pick(1, 1, 2, 3, *([length, length + 1] if length < 10 else [])) for length in size]
    window = math.prod(-(-length // out) for length, out in zip(size, outs, strict=True))
    return mean(b, "adaptive_avg_pool", x, (batch, channels, *outs), {"output_size": outs}, window)


def mean(b: Builder, kind: str, x: str, shape: Shape, attrs: dict[str, Any], window: int) -> str:
    """Output stage of an average: one factor, or one per output position."""
    qtype, outs = b.qtype(), shape[2:]
    per_position = math.prod(outs) <= 64 and b.pick(True, False)
    reach = float(-b.values[x].qtype.limits[0] * window)
    m, n = b.factors([reach] * (math.prod(outs) if per_position else 1), qtype.limits[1])
    factors = {"multiplier": int32(m), "shift": int32(n)}
    if per_position:
        factors = {role: tensor.reshape(outs) for role, tensor in factors.items()}
    return b.emit(kind, [x], shape, qtype, {**attrs, **b.limits(qtype)}, **factors)


# -- the borders to float -----------------------------------------------------------------------------------------


def quantize(b: Builder) -> str:
    """Of floats around the codes of the output, exactly on halves, far outside, infinite, subnormal."""
    pattern, top = b.pick("normal", "halves", "dyadic halves", "extreme"), b.pick(3, 128, 32768)
    scale = 2.0 ** b.rng.uniform(-20, 6)
    if pattern == "dyadic halves":
        scale = 2.0 ** round(math.log2(scale))
    qtype = QType(b.pick("int8", "int16"), scale)
    shape = (b.batch, b.between(1, 5), b.between(1, 40))
    data: Array
    if pattern == "normal":
        data = b.rng.normal(0, top * scale, shape)
    elif pattern == "extreme":
        data = b.rng.choice([np.inf, -np.inf, 3e38, -3e38, 1e-45, -1e-40, 0.0, -0.0], shape)
    else:
        data = (b.rng.integers(-top - 1, top + 1, shape) + 0.5) * float(np.float32(scale))
    x = b.feed_array(data.astype(np.float32), FLOAT)
    return b.emit("quantize", [x], b.values[x].shape, qtype)


def dequantize(b: Builder, x: str) -> str:
    """Of codes as they are; of an accumulator with a scale per channel."""
    value = b.values[x]
    if value.qtype.dtype != "int32":
        return b.emit("dequantize", [x], value.shape, FLOAT)
    shape = [value.shape[-1]] if b.ops[-1].kind == "linear" else [1, value.shape[1], *[1] * (len(value.shape) - 2)]
    scale = torch.from_numpy((2.0 ** b.rng.uniform(-30, 3, shape)).astype(np.float32))
    return b.emit("dequantize", [x], value.shape, FLOAT, scale=scale)
