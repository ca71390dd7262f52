"""Ops that meet element by element; the shapes of the inputs broadcast."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .integers import Ints
from .task import Task

RELATIONS: dict[str, Callable[..., Ints]] = {
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
CONNECTIVES: dict[str, Callable[..., Ints]] = {
    "not": np.logical_not,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def add(task: Task, a: Ints, b: Ints) -> Ints:
    m1, m2 = (int(m) for m in task.consts["multiplier"])
    return task.finish(task.exact(a) * m1 + task.exact(b) * m2, task.consts["shift"])


def mul(task: Task, a: Ints, b: Ints) -> Ints:
    m, n = task.factor(0)
    return task.finish(task.exact(a) * task.exact(b) * m, n)


def maximum(task: Task, a: Ints, b: Ints) -> Ints:
    return np.maximum(_rescaled(task, a, 0), _rescaled(task, b, 1))


def minimum(task: Task, a: Ints, b: Ints) -> Ints:
    return np.minimum(_rescaled(task, a, 0), _rescaled(task, b, 1))


def _rescaled(task: Task, x: Ints, i: int) -> Ints:
    m, n = task.factor(i)
    return task.finish(task.exact(x) * m, n)


def neg(task: Task, x: Ints) -> Ints:
    return task.saturated(-x)


def absolute(task: Task, x: Ints) -> Ints:
    return task.saturated(abs(x))


def clamp(task: Task, x: Ints) -> Ints:
    return np.clip(x, task.attrs["lo"], task.attrs["hi"])


def cast(task: Task, x: Ints) -> Ints:
    """By the float32 division of section 2; without a scale x itself."""
    if task.scale is None:
        return task.saturated(x)
    quotient = x.astype(np.float32) / np.float32(task.scale)
    return np.clip(np.rint(quotient.astype(np.float64)), task.attrs["lo"], task.attrs["hi"]).astype(np.int64)


def compare(task: Task, a: Ints, b: Ints) -> Ints:
    """In Python integers: 31 bits of code, 24 of mantissa and 64 of exponent."""
    sides = [
        x.astype(object) * (int(m) << int(e))
        for x, m, e in zip((a, b), task.consts["mantissa"], task.consts["exponent"], strict=True)
    ]
    return RELATIONS[task.attrs["function"]](*sides).astype(np.int64)


def logical(task: Task, *inputs: Ints) -> Ints:
    return CONNECTIVES[task.attrs["function"]](*(x != 0 for x in inputs)).astype(np.int64)


def where(task: Task, condition: Ints, *tensors: Ints) -> Ints:
    rescaled = iter([_rescaled(task, x, i) for i, x in enumerate(tensors)])
    branches = [next(rescaled) if code is None else code for code in (task.attrs["true"], task.attrs["false"])]
    return np.where(condition != 0, *branches)


def prelu(task: Task, x: Ints) -> Ints:
    """One factor each for both signs, of the whole tensor or per channel on axis 1."""
    roles = ("multiplier", "negative_multiplier", "shift")
    positive, negative, n = (task.consts[role].reshape(-1, *[1] * (x.ndim - 2)) for role in roles)
    return task.requantize(x * np.where(x >= 0, positive, negative), n)
