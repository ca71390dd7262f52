"""Sums, means and extremes over axes and windows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from .integers import INT32_MIN, Ints, sat32
from .task import Task
from .windows import adaptive_bounds, pad, taps


def total(task: Task, x: Ints) -> Ints:
    acc = sat32(x.sum(axis=tuple(task.attrs["axes"]), keepdims=bool(task.attrs["keepdim"])))
    if "multiplier" not in task.consts:
        return acc
    m, n = task.factor(0)
    return task.requantize(acc * m, n)


def amax(task: Task, x: Ints) -> Ints:
    return np.asarray(x.max(axis=tuple(task.attrs["axes"]), keepdims=bool(task.attrs["keepdim"])))


def amin(task: Task, x: Ints) -> Ints:
    return np.asarray(x.min(axis=tuple(task.attrs["axes"]), keepdims=bool(task.attrs["keepdim"])))


def argmax(task: Task, x: Ints) -> Ints:
    """NumPy returns the first of equal codes."""
    return np.asarray(np.argmax(x, axis=task.attrs["axis"], keepdims=bool(task.attrs["keepdim"])))


def argmin(task: Task, x: Ints) -> Ints:
    return np.asarray(np.argmin(x, axis=task.attrs["axis"], keepdims=bool(task.attrs["keepdim"])))


def topk(task: Task, x: Ints) -> Ints:
    """A stable sort keeps the order of equal codes."""
    axis = task.attrs["axis"]
    order = np.argsort(-x if task.attrs["largest"] else x, axis=axis, kind="stable")
    return np.take(order, range(task.attrs["k"]), axis=axis)


def max_pool(task: Task, x: Ints) -> Ints:
    attrs = task.attrs
    padded = pad(x, attrs["padding"], INT32_MIN)
    parts = [part for _, part in taps(padded, attrs["kernel"], attrs["stride"], attrs["dilation"])]
    largest: Ints = np.max(parts, axis=0)
    return largest


def avg_pool(task: Task, x: Ints) -> Ints:
    attrs = task.attrs
    padded = pad(x, attrs["padding"], 0)
    summed = np.sum([part for _, part in taps(padded, attrs["kernel"], attrs["stride"], [1] * (x.ndim - 2))], axis=0)
    return task.requantize(sat32(summed) * task.consts["multiplier"], task.consts["shift"])


def adaptive_avg_pool(task: Task, x: Ints) -> Ints:
    summed = np.zeros((*x.shape[:2], *task.attrs["output_size"]), dtype=np.int64)
    for at, window in _adaptive_windows(task, x):
        summed[at] = window.sum(axis=-1)
    return task.requantize(sat32(summed) * task.consts["multiplier"], task.consts["shift"])


def adaptive_max_pool(task: Task, x: Ints) -> Ints:
    largest = np.zeros((*x.shape[:2], *task.attrs["output_size"]), dtype=np.int64)
    for at, window in _adaptive_windows(task, x):
        largest[at] = window.max(axis=-1)
    return largest


def _adaptive_windows(task: Task, x: Ints) -> Iterator[tuple[tuple[Any, ...], Ints]]:
    """Every output position of ``[N, C, *out]`` with its window, flat: ``[N, C, elements]``."""
    size = [int(parts) for parts in task.attrs["output_size"]]
    bounds = [adaptive_bounds(length, parts) for length, parts in zip(x.shape[2:], size, strict=True)]
    for at in product(*(range(parts) for parts in size)):
        cut: tuple[Any, ...] = (..., *(slice(*bounds[axis][i]) for axis, i in enumerate(at)))
        yield (..., *at), x[cut].reshape(*x.shape[:2], -1)
