"""Tabulated functions of one tensor: paragraph "Tables" of section 4 of ``docs/numerics.md``."""

from __future__ import annotations

import numpy as np

from .integers import Ints
from .task import Task


def table(task: Task, x: Ints) -> Ints:
    entries = task.consts["table"]
    if "start" not in task.consts:
        return entries[x + 128]
    about = task.attrs["table"]
    symmetry, (first, last) = about["symmetry"], about["codes"]
    start, step, offset = (task.consts[role] for role in ("start", "step", "offset"))
    u = np.clip(x if symmetry == "none" else abs(x), first, last)
    k = np.sum(u[..., None] >= start, axis=-1) - 1
    d, h = u - start[k], step[k]
    j, rest = offset[k] + (d >> h), d % (1 << h)
    after = np.minimum(j + 1, len(entries) - 1)
    v = entries[j] + np.where(rest == 0, 0, task.rounding((entries[after] - entries[j]) * rest, h))
    if symmetry == "odd":
        v = np.where(x < 0, -v, v)
    return task.requantize(v, about["extra_bits"])
