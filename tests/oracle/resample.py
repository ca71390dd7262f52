"""Resizing by index and by coefficients, and sampling at coordinates. ``x`` is ``[N, C, *in]``."""

from __future__ import annotations

from itertools import product

import numpy as np

from .integers import Ints
from .task import Task


def resize_nearest(task: Task, x: Ints) -> Ints:
    for i in range(x.ndim - 2):
        x = np.take(x, task.consts[f"index{i}"], axis=2 + i)
    return x


def resize_linear(task: Task, x: Ints) -> Ints:
    """All axes first, one rounding at the end."""
    acc = x
    for i in range(x.ndim - 2):
        acc = np.moveaxis(np.tensordot(acc, task.consts[f"weight{i}"], axes=(2 + i, 1)), -1, 2 + i)
    return task.requantize(acc, task.attrs["bits"] * (x.ndim - 2))


def grid_sample(task: Task, x: Ints, grid: Ints) -> Ints:
    """``x`` ``[N, C, H, W]``, ``grid`` ``[N, Ho, Wo, 2]`` (column, row)."""
    k = task.attrs["bits"]
    column, row = _position(task, grid, 0, x.shape[3]), _position(task, grid, 1, x.shape[2])
    if task.attrs["mode"] == "nearest":
        return _neighbour(x, task.rounding(row, k), task.rounding(column, k))
    u, v = column >> k, row >> k
    fu, fv = column - (u << k), row - (v << k)
    acc = np.zeros((len(x), x.shape[1], *grid.shape[1:3]), dtype=np.int64)
    for down, right in product((0, 1), (0, 1)):
        weight = (fv if down else 2**k - fv) * (fu if right else 2**k - fu)
        acc += weight[:, None] * _neighbour(x, v + down, u + right)
    return task.rounding(acc, 2 * k)


def _position(task: Task, grid: Ints, axis: int, size: int) -> Ints:
    """Columns (axis 0) or rows (axis 1) in units of ``2^-k`` pixels, ``[N, Ho, Wo]``."""
    k = task.attrs["bits"]
    m, n = task.factor(axis)
    position = task.rounding(grid[..., axis] * m, n)
    if task.attrs["unit"] == "pixels":
        steps = np.arange(grid.shape[2 - axis]) << k
        position = position + (steps if axis == 0 else steps[:, None])
    else:
        position = position + ((size - 1) << (k - 1))
    if task.attrs["padding_mode"] == "border":
        position = np.clip(position, 0, (size - 1) << k)
    return np.asarray(position)


def _neighbour(x: Ints, row: Ints, column: Ints) -> Ints:
    """``x`` at whole positions ``[N, Ho, Wo]``, 0 outside of it: ``[N, C, Ho, Wo]``."""
    height, width = x.shape[2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    n = np.arange(len(x))[:, None, None]
    found = x[n, :, np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    return np.asarray(np.moveaxis(found, -1, 1) * inside[:, None])
