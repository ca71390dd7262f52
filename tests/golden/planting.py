"""Planting a fault in a dump, and looking at what the comparison says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qatlib.golden import Comparison, Golden, compare_dump
from tests.oracle import half_even
from tests.oracle.integers import Ints, Rounding
from tests.oracle.kernels import INTEGER_KINDS
from tests.oracle.task import Task

BATCH = 5
Array = NDArray[Any]
Plant = Callable[[Golden], Any]


@dataclass(frozen=True)
class Fault:
    """``plant`` makes what the dump holds for tensor ``name``: an array (.npy) or bytes (.bin).

    ``kinds`` are those of all causes that may be named, the likely one first; ``said`` is part of their text or
    evidence. ``hidden`` are tensors that the dump does not hold.
    """

    name: str
    plant: Plant
    kinds: str
    said: str = ""
    hidden: tuple[str, ...] = ()

    def check(self, golden: Golden, folder: Path) -> Comparison:
        """Assert that the first difference is at ``name``, has these causes and no other."""
        comparison = parted(golden, folder, {self.name: self.plant(golden), **dict.fromkeys(self.hidden)})
        first = comparison.first
        assert first is not None
        assert (first.tensor, [first.cause.kind, *(cause.kind for cause in first.also)]) == (
            self.name,
            self.kinds.split(),
        ), first
        assert self.said in str((first.cause, first.also))
        assert first.not_compared == tuple(x for x in golden.by_name[self.name].inputs if x in self.hidden)
        others = {name: state for name, state in status(comparison).items() if name != self.name}
        assert set(others.values()) <= {"equal", "missing"}
        assert {name for name, state in others.items() if state == "missing"} == set(self.hidden)
        return comparison


def dump(golden: Golden, folder: Path, changed: Mapping[str, Any], only: list[str] | None = None) -> Path:
    """The golden tensors as a device would write them; ``changed`` holds arrays (.npy), bytes (.bin) or None."""
    folder.mkdir()
    for entry in golden.entries:
        content = changed.get(entry.name, golden.tensors[entry.name])
        if content is None or (only is not None and entry.name not in only):
            continue
        if isinstance(content, bytes):
            (folder / f"{entry.name}.bin").write_bytes(content)
        else:
            np.save(folder / f"{entry.name}.npy", content)
    return folder


def parted(golden: Golden, folder: Path, changed: Mapping[str, Any], only: list[str] | None = None) -> Comparison:
    return compare_dump(golden.folder, dump(golden, folder / "dump", changed, only))


def status(comparison: Comparison) -> dict[str, str]:
    return {result.name: result.status for result in comparison.tensors}


# -- an op once more, by the oracle ------------------------------------------------------------------------------------


def again(
    golden: Golden, name: str, rounding: Rounding = half_even, without: tuple[str, ...] = (), **other: Any
) -> Array:
    """Op ``name`` by the oracle, from its golden inputs; ``other`` attributes and constants, some ``without``."""
    op, qtype = golden.ops[name], golden.program.values[name].qtype
    consts = {role: golden.program.constant(op, role).numpy().astype(np.int64) for role in op.consts}
    given = {key: value for key, value in {**consts, **other}.items() if key in consts and key not in without}
    task = Task({**op.attrs, **other}, given, qtype.limits, qtype.scale, rounding)
    return INTEGER_KINDS[op.kind](task, *(golden.tensors[x].astype(np.int64) for x in op.inputs))


def exact(golden: Golden, name: str) -> Array:
    """What an op that rounds once has before: float64, which holds it exactly."""
    seen: list[Array] = []

    def keep(numerator: Ints, shift: Any) -> Ints:
        seen.append(np.ldexp(numerator.astype(np.float64), -np.asarray(shift, np.int32)))
        return half_even(numerator, shift)

    again(golden, name, keep)
    (real,) = seen
    return real


def clamped(golden: Golden, name: str, real: Array) -> Array:
    """``real`` rounded and clamped as the op does it."""
    op, entry = golden.ops[name], golden.by_name[name]
    lo, hi = golden.program.values[name].qtype.limits
    return np.clip(np.rint(real), op.attrs.get("lo", lo), op.attrs.get("hi", hi)).astype(entry.dtype)


def floor(numerator: Ints, shift: Any) -> Ints:
    """An arithmetic shift."""
    return numerator >> np.asarray(shift, np.int64)


def truncate(numerator: Ints, shift: Any) -> Ints:
    """C's division."""
    return np.sign(numerator) * floor(np.abs(numerator), shift)


def half_up(numerator: Ints, shift: Any) -> Ints:
    """Half of the divisor added before an arithmetic shift."""
    return floor(2 * numerator + (np.int64(1) << np.asarray(shift, np.int64)), np.asarray(shift) + 1)


def half_to_zero(numerator: Ints, shift: Any) -> Ints:
    return -np.sign(numerator) * half_up(-np.abs(numerator), shift)


# -- how devices store -------------------------------------------------------------------------------------------------


def channels_last(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim > 2 else x


def padded(x: Array, multiple: int = 32) -> Array:
    width = [(0, 0)] * x.ndim
    width[1] = (0, -x.shape[1] % multiple)
    return np.pad(x, width)


def blocks(x: Array, size: int = 4) -> Array:
    batch, channels, *space = x.shape
    return np.ascontiguousarray(np.moveaxis(x.reshape(batch, channels // size, size, *space), 2, -1))
