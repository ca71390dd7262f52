"""Section 4 of ``docs/numerics.md``, one function per kind of Program op. Integers are int64 here, codes in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .integers import INT32_MIN, Ints, Rounding, sat32
from .windows import adaptive_bounds, pad, taps


@dataclass(frozen=True)
class Task:
    """One op: its ``attrs`` and constants (integers as int64), and the rounding rule."""

    attrs: Mapping[str, Any]
    consts: Mapping[str, NDArray[Any]]
    rounding: Rounding

    def requantize(self, numerator: Ints, shift: NDArray[Any]) -> Ints:
        return np.clip(self.rounding(numerator, shift), self.attrs["lo"], self.attrs["hi"])


def conv(task: Task, x: Ints, *addend: Ints) -> Ints:
    """``x`` ``[N, I, *in]``, addend ``[N, O, *out]``."""
    attrs, weight = task.attrs, task.consts["weight"]
    groups = int(attrs["groups"])
    outs, ins = weight.shape[0] // groups, weight.shape[1]
    padded = pad(x, attrs["padding"], 0)
    acc: Any = 0
    for position, part in taps(padded, weight.shape[2:], attrs["stride"], attrs["dilation"]):
        at: tuple[Any, ...] = (slice(None), slice(None), *position)
        w = weight[at]
        sums = [
            np.tensordot(w[g * outs : (g + 1) * outs], part[:, g * ins : (g + 1) * ins], axes=(1, 1))
            for g in range(groups)
        ]
        acc = acc + np.moveaxis(np.concatenate(sums), 0, 1)
    return _finish(task, acc, addend, (-1, *[1] * (x.ndim - 2)))


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


def add(task: Task, a: Ints, b: Ints) -> Ints:
    m1, m2 = task.consts["multiplier"]
    return task.requantize(a * m1 + b * m2, task.consts["shift"])


def cat(task: Task, *inputs: Ints) -> Ints:
    factors = zip(inputs, task.consts["multiplier"], task.consts["shift"], strict=True)
    return np.concatenate([task.requantize(x * m, n) for x, m, n in factors], axis=task.attrs["axis"])


def clamp(task: Task, x: Ints) -> Ints:
    return np.clip(x, task.attrs["lo"], task.attrs["hi"])


def max_pool(task: Task, x: Ints) -> Ints:
    attrs = task.attrs
    padded = pad(x, attrs["padding"], INT32_MIN)
    parts = [part for _, part in taps(padded, attrs["kernel"], attrs["stride"], attrs["dilation"])]
    largest: Ints = np.max(parts, axis=0)
    return largest


def avg_pool(task: Task, x: Ints) -> Ints:
    attrs = task.attrs
    padded = pad(x, attrs["padding"], 0)
    total = np.sum([part for _, part in taps(padded, attrs["kernel"], attrs["stride"], [1] * (x.ndim - 2))], axis=0)
    return task.requantize(sat32(total) * task.consts["multiplier"], task.consts["shift"])


def adaptive_avg_pool(task: Task, x: Ints) -> Ints:
    size = [int(parts) for parts in task.attrs["output_size"]]
    bounds = [adaptive_bounds(length, parts) for length, parts in zip(x.shape[2:], size, strict=True)]
    total = np.zeros((*x.shape[:2], *size), dtype=np.int64)
    for at in product(*(range(parts) for parts in size)):
        window: tuple[Any, ...] = (..., *(slice(*bounds[axis][i]) for axis, i in enumerate(at)))
        here: tuple[Any, ...] = (..., *at)
        total[here] = x[window].reshape(*x.shape[:2], -1).sum(axis=-1)
    return task.requantize(sat32(total) * task.consts["multiplier"], task.consts["shift"])


def reshape(task: Task, x: Ints) -> Ints:
    return x.reshape(task.attrs["shape"])


def permute(task: Task, x: Ints) -> Ints:
    return x.transpose(task.attrs["dims"])


INTEGER_KINDS: dict[str, Callable[..., Ints]] = {
    "conv": conv,
    "linear": linear,
    "add": add,
    "cat": cat,
    "clamp": clamp,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "adaptive_avg_pool": adaptive_avg_pool,
    "reshape": reshape,
    "permute": permute,
}
