"""Ops that leave codes as they are: joined, cut, moved, looked up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .integers import Ints
from .task import Task


def constant(task: Task) -> Ints:
    return task.consts["value"]


def cat(task: Task, *inputs: Ints) -> Ints:
    if "multiplier" not in task.consts:
        joined: Ints = np.concatenate(inputs, axis=task.attrs["axis"])
        return joined
    factors = zip(inputs, task.consts["multiplier"], task.consts["shift"], strict=True)
    rescaled: Ints = np.concatenate([task.requantize(x * m, n) for x, m, n in factors], axis=task.attrs["axis"])
    return rescaled


def reshape(task: Task, x: Ints) -> Ints:
    return x.reshape(task.attrs["shape"])


def permute(task: Task, x: Ints) -> Ints:
    return x.transpose(task.attrs["dims"])


def slices(task: Task, x: Ints) -> Ints:
    cut = [slice(None)] * x.ndim
    for axis, start, stop, step in zip(*(task.attrs[k] for k in ("axes", "starts", "stops", "steps")), strict=True):
        cut[axis] = slice(start, stop, step)
    part: Ints = x[tuple(cut)]
    return part


def take(task: Task, x: Ints) -> Ints:
    return np.take(x, list(task.attrs["index"]), axis=task.attrs["axis"])


def gather(task: Task, x: Ints, index: Ints) -> Ints:
    """Element by element; an index outside the axis raises IndexError, which includes negative ones."""
    axis = task.attrs["axis"]
    y = np.empty(index.shape, dtype=np.int64)
    for p in np.ndindex(*index.shape):
        y[p] = x[(*p[:axis], _inside(int(index[p]), x.shape[axis]), *p[axis + 1 :])]
    return y


def embedding(task: Task, table: Ints, ids: Ints) -> Ints:
    y = np.empty((*ids.shape, *table.shape[1:]), dtype=np.int64)
    for p in np.ndindex(*ids.shape):
        y[p] = table[_inside(int(ids[p]), len(table))]
    return y


def _inside(index: int, size: int) -> int:
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside [0, {size})")
    return index


def expand(task: Task, x: Ints, *like: Ints) -> Ints:
    batch = 1
    if task.attrs["batch"] is not None:
        source, axis, times = task.attrs["batch"]
        batch = (x, *like)[source].shape[axis] // times
    return np.broadcast_to(x, [-size * batch if size < 0 else size for size in task.attrs["shape"]])


def pad(task: Task, x: Ints) -> Ints:
    """One axis after the other: mode ``constant`` appends a position that holds the value and reads that."""
    mode = task.attrs["mode"]
    for axis, (before, after) in enumerate(task.attrs["padding"]):
        n = x.shape[axis]
        inside = [(p - before, n) for p in range(n + before + after)]
        if mode == "constant":
            value = np.full((*x.shape[:axis], 1, *x.shape[axis + 1 :]), task.attrs["value"], dtype=np.int64)
            source = [q if 0 <= q < n else n for q, n in inside]
            x = np.take(np.concatenate([x, value], axis), source, axis)
        else:
            x = np.take(x, [PAD_SOURCE[mode](q, n) for q, n in inside], axis)
    return x


PAD_SOURCE: dict[str, Callable[[int, int], int]] = {
    "replicate": lambda q, n: min(max(q, 0), n - 1),
    "circular": lambda q, n: q % n,
    "reflect": lambda q, n: -q if q < 0 else 2 * (n - 1) - q if q >= n else q,
}
