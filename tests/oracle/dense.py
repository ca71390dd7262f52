"""Sums of products: convolutions (``x`` ``[N, I, *in]``, result ``[N, O, *out]``), linear, matmul."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from .integers import Ints, sat32
from .task import Task
from .windows import pad, taps


def conv(task: Task, x: Ints, *addend: Ints) -> Ints:
    attrs, weight = task.attrs, task.consts["weight"]
    padded = pad(x, attrs["padding"], 0)
    acc: Any = 0
    for position, part in taps(padded, weight.shape[2:], attrs["stride"], attrs["dilation"]):
        at: tuple[Any, ...] = (slice(None), slice(None), *position)
        acc = acc + _mix(weight[at], part, int(attrs["groups"]))
    return _finish(task, acc, addend, (-1, *[1] * (x.ndim - 2)))


def conv_transpose(task: Task, x: Ints, *addend: Ints) -> Ints:
    """Every input position u puts its products at ``u * stride + t * dilation`` for every position t of the kernel."""
    attrs, weight = task.attrs, task.consts["weight"]
    stride, dilation, padding = attrs["stride"], attrs["dilation"], attrs["padding"]
    axes = list(zip(x.shape[2:], weight.shape[2:], stride, dilation, strict=True))
    full = np.zeros((len(x), len(weight), *((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in axes)), dtype=np.int64)
    for position in product(*(range(k) for k in weight.shape[2:])):
        met = tuple(slice(t * d, t * d + (n - 1) * s + 1, s) for t, (n, _, s, d) in zip(position, axes, strict=True))
        at: tuple[Any, ...] = (slice(None), slice(None), *position)
        target: tuple[Any, ...] = (..., *met)
        full[target] += _mix(weight[at], x, int(attrs["groups"]))
    grown = pad(full, [[max(0, -side) for side in sides] for sides in padding], 0)
    cut = (slice(max(0, b), n - max(0, a)) for (b, a), n in zip(padding, grown.shape[2:], strict=True))
    kept: tuple[Any, ...] = (..., *cut)
    return _finish(task, grown[kept], addend, (-1, *[1] * (x.ndim - 2)))


def _mix(weight: Ints, x: Ints, groups: int) -> Ints:
    """``weight`` ``[O, I/groups]`` of one kernel position applied to the channels of ``x``."""
    outs, ins = weight.shape[0] // groups, weight.shape[1]
    sums = [
        np.tensordot(weight[g * outs : (g + 1) * outs], x[:, g * ins : (g + 1) * ins], axes=(1, 1))
        for g in range(groups)
    ]
    return np.moveaxis(np.concatenate(sums), 0, 1)


def linear(task: Task, x: Ints, *addend: Ints) -> Ints:
    """``x`` ``[N, ..., I]``, addend ``[N, ..., O]``."""
    return _finish(task, np.tensordot(x, task.consts["weight"], axes=(-1, 1)), addend, (-1,))


def _finish(task: Task, total: Ints, addend: tuple[Ints, ...], channel: tuple[int, ...]) -> Ints:
    """Bias, saturation and requantization; ``channel`` is the shape in which ``[O]`` meets the accumulator."""
    acc = sat32(total + task.consts["bias"].reshape(channel))
    if "multiplier" not in task.consts:
        return acc
    numerator = acc * task.consts["multiplier"].reshape(channel)
    for x2 in addend:
        numerator = numerator + x2 * task.consts["addend_multiplier"].reshape(channel)
    return task.requantize(numerator, task.consts["shift"].reshape(channel))


def matmul(task: Task, a: Ints, b: Ints) -> Ints:
    """``a`` ``[..., I, K]``, ``b`` ``[..., K, J]``."""
    m, n = task.factor(0)
    a, b = (task.rounding(x, bits) for x, bits in zip((a, b), task.attrs["drop"], strict=True))
    return task.requantize(sat32(a @ b) * m, n)
