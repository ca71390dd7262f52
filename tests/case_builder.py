"""Building one generated Program with its inputs: data patterns, factors, bookkeeping of values and constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qatlib.program import Op, Program, Value, verify
from qatlib.qtype import BOOL, DType, QType
from qatlib.qtype import INT32 as COUNTS
from tests.oracle import (
    FactorError,
    addend_factor,
    factor,
    half_away,
    half_even,
    lone_factor,
    signed_pair,
    single_precision,
    sum_factor,
)

Array = NDArray[Any]
Shape = tuple[int, ...]
PATTERNS = ("uniform", "min", "max", "alternating", "high", "ramp", "small", "sparse")
EXTREMES = ("high", "high", "max", "min", "alternating")
INT32 = 2**31


@dataclass(frozen=True)
class Case:
    """A Program and one batch of its inputs, in the dtypes of its input values; the ``seed`` that makes it again."""

    program: Program
    inputs: tuple[Array, ...]
    seed: int | None = None

    def __repr__(self) -> str:
        return f"<{' '.join(op.kind for op in self.program)}, seed {self.seed}>"


def codes(rng: np.random.Generator, pattern: str, shape: Shape, lo: int, hi: int) -> Array:
    """Integers in [lo, hi], int64: random, extreme or structured."""
    count = math.prod(shape)
    made: dict[str, Callable[[], Array]] = {
        "uniform": lambda: rng.integers(lo, hi + 1, count),
        "min": lambda: np.full(count, lo),
        "max": lambda: np.full(count, hi),
        "alternating": lambda: np.where(np.arange(count) % 2, hi, lo),
        "high": lambda: rng.integers(hi - hi // 16, hi + 1, count),
        "ramp": lambda: (np.arange(count) - count // 2 - lo) % (hi - lo + 1) + lo,
        "small": lambda: rng.integers(max(lo, -2), min(hi, 2) + 1, count),
        "sparse": lambda: rng.integers(lo, hi + 1, count) * (rng.random(count) < 0.2),
    }
    return made[pattern]().reshape(shape).astype(np.int64)


@dataclass
class Builder:
    """Collects one Program. Every choice comes from ``rng``."""

    batch: int
    rng: np.random.Generator
    values: dict[str, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    feeds: dict[str, Array] = field(default_factory=dict)

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def between(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def qtype(self, dtype: DType | None = None) -> QType:
        """int8 or int16 with a scale in [2^-20, 2^6]."""
        return QType(dtype or self.pick("int8", "int16"), float(np.float32(2.0 ** self.rng.uniform(-20, 6))))

    def feed(self, shape: Shape, qtype: QType | None = None, pattern: str | None = None) -> str:
        """A new Program input of integer codes; ``shape`` without the batch."""
        qtype = qtype or self.qtype()
        data = codes(self.rng, pattern or self.pick(*PATTERNS), (self.batch, *shape), *qtype.limits)
        return self.feed_array(data.astype(qtype.dtype), qtype)

    def feed_array(self, data: Array, qtype: QType) -> str:
        name = f"in{len(self.feeds)}"
        self.feeds[name] = data
        self.values[name] = Value(name, (-1, *data.shape[1:]), qtype)
        return name

    def emit(
        self,
        kind: str,
        inputs: Sequence[str],
        shape: Shape,
        qtype: QType,
        attrs: dict[str, Any] | None = None,
        **consts: torch.Tensor,
    ) -> str:
        """Append an op; ``shape`` with -1 for the batch. Returns the name of its output."""
        name = f"{kind}{len(self.ops)}"
        self.values[name] = Value(name, tuple(shape), qtype)
        self.constants.update({f"{name}.{role}": tensor for role, tensor in consts.items()})
        self.ops.append(Op(kind, name, tuple(inputs), attrs or {}, {role: f"{name}.{role}" for role in consts}))
        return name

    def finish(self, *outputs: str) -> Case:
        program = Program(tuple(self.feeds), outputs, tuple(self.ops), self.values, self.constants)
        return Case(verify(program), tuple(self.feeds.values()))

    def limits(self, qtype: QType) -> dict[str, int]:
        """``lo`` and ``hi`` of an output clamp: open, relu, relu6-like, two-sided."""
        qmin, qmax = qtype.limits
        lo = self.pick(qmin, qmin, qmin, 0, self.between(qmin, 0))
        return {"lo": lo, "hi": self.pick(qmax, qmax, qmax, self.between(lo, qmax))}

    def real(self, reach: float, qmax: int, mode: str, headroom: float) -> float:
        """A factor for accumulators up to ``reach``.

        One that fills the output format, at most ``2^headroom`` times over; a power of two; or one of any three scales.
        """
        fit = min(float(qmax / max(reach, 1.0) * 2.0 ** self.rng.uniform(-2, headroom)), 64.0)
        if mode == "dyadic":
            exponent = round(math.log2(fit)) if self.rng.random() < 0.5 else -int(self.rng.integers(0, 4))
            return float(2.0 ** min(exponent, 0) * self.rng.choice([1, 1, 3]))
        if mode == "scales":
            s_x, s_w, s_y = (float(np.float32(s)) for s in 2.0 ** self.rng.uniform(-20, 6, 3))
            return s_x * s_w / s_y
        return fit

    def bits(self) -> int:
        """Multiplier bits: 20 unless said, 8..21 allowed."""
        return int(self.pick(20, self.between(8, 21)))

    def factors(self, reaches: Sequence[float], qmax: int) -> tuple[Array, Array]:
        """``(M, n)``, one per reach: by scales through the oracle, dyadic (true ties), or M straight from its range."""
        bits, mode = self.bits(), self.pick("dyadic", "fit", "dyadic", "fit", "scales", "raw")
        pairs = []
        for reach in reaches:
            m, n = or_fit(self, (reach,), qmax, mode, lambda r: factor(r, bits))
            if mode == "raw":
                m = (2 ** (bits - 1), 2**bits - 1, int(self.rng.integers(2 ** (bits - 1), 2**bits)))[
                    self.rng.integers(3)
                ]
                n = (n, n, int(self.rng.integers(0, 63)))[self.rng.integers(3)]
            pairs.append((m, n))
        return np.array([m for m, _ in pairs]), np.array([n for _, n in pairs])

    def addend_factors(self, reaches: Sequence[float], reach2: float, qmax: int) -> tuple[Array, Array, Array]:
        """``(M1, M2, n)`` of accumulators with the given reaches and an addend with ``reach2``."""
        bits, mode = self.bits(), self.pick("fit", "fit", "dyadic", "scales")
        rows = [or_fit(self, (reach, reach2), qmax, mode, lambda a, b: addend_factor(a, b, bits)) for reach in reaches]
        m1, m2, n = np.array(rows).T
        return m1, m2, n

    def sum_factors(self, names: Sequence[str], output: QType) -> dict[str, torch.Tensor]:
        """Constants of ``add`` for the two inputs ``names``: both signs, terms that count for nothing or everything."""
        bits, mode = self.bits(), self.pick("fit", "fit", "dyadic", "scales", "lopsided")
        reach = tuple(-self.values[name].qtype.limits[0] for name in names)
        signs = self.pick((1, 1), (1, 1), (1, -1), (-1, 1), (-1, -1))

        def make(r1: float, r2: float) -> tuple[int, ...]:
            if mode == "lopsided":
                r2 *= 2.0 ** self.rng.uniform(-50, 20)
            return sum_factor(signs[0] * r1, signs[1] * r2, bits, (reach[0], reach[1]), output.limits[0])

        m1, m2, n = or_fit(self, reach, output.limits[1], mode, make)
        return {"multiplier": int32([m1, m2]), "shift": int32([n])}

    def one_factor(self, reach: float, output: QType) -> dict[str, torch.Tensor]:
        """``multiplier`` and ``shift`` of one accumulator."""
        m, n = self.factors([reach], output.limits[1])
        return {"multiplier": int32(m), "shift": int32(n)}

    def lone_factors(self, reaches: Sequence[float], output: QType) -> dict[str, torch.Tensor]:
        """``multiplier`` and ``shift`` of terms that are rescaled on their own; now and then one of the two ends."""
        bits, mode = self.bits(), self.pick("dyadic", "fit", "dyadic", "fit", "scales", "end")
        made = []
        for reach in reaches:
            r = self.real(reach, output.limits[1], mode, 8.0)
            if mode == "end":
                r = 2.0 ** self.rng.choice([-45.0, -40.0, 22.0])
            made.append(lone_factor(r, bits))
        return {"multiplier": int32([m for m, _ in made]), "shift": int32([n for _, n in made])}

    def slope_factors(self, count: int, reach: float, output: QType) -> dict[str, torch.Tensor]:
        """Constants of ``prelu``: slopes of both signs, 0, tiny and above 1."""
        bits, mode = self.bits(), self.pick("fit", "dyadic", "scales")
        rows = []
        for _ in range(count):
            slope = float(self.rng.choice([0.01, 0.25, 0.0, 1.0, -0.5, 3.0, self.rng.normal()]))
            rows.append(or_fit(self, (reach,), output.limits[1], mode, lambda r, s=slope: signed_pair(r, s * r, bits)))
        columns = zip(("multiplier", "negative_multiplier", "shift"), np.array(rows).T, strict=True)
        return {role: int32(column) for role, column in columns}

    def feed_bool(self, shape: Shape) -> str:
        """A new Program input of truth values."""
        return self.feed_array(self.rng.integers(0, 2, (self.batch, *shape)).astype(np.int8), BOOL)

    def feed_counts(self, shape: Shape, low: int = -INT32, high: int = INT32 - 1) -> str:
        """A new Program input of integers without a scale."""
        pattern = self.pick("uniform", "uniform", "min", "max", "alternating", "small")
        data = codes(self.rng, pattern, (self.batch, *shape), low, high).clip(low, high)
        return self.feed_array(data.astype(np.int32), COUNTS)

    def constant(self, shape: Shape, qtype: QType) -> str:
        """A constant of codes without a batch axis, or with one of size 1."""
        data = codes(self.rng, self.pick("uniform", "alternating", "max"), shape, *qtype.limits).astype(qtype.dtype)
        return self.emit("constant", [], shape, qtype, value=torch.from_numpy(data))

    def partner(self, x: str, qtype: QType | None = None) -> tuple[str, Shape]:
        """A second input for an elementwise op and the shape of the result; on some axes one of the two broadcasts.

        It is another feed, ``x`` itself, or a constant with as many axes or fewer.
        """
        sizes = self.values[x].shape[1:]
        wanted = tuple(self.pick(1, 3) if size == 1 else self.pick(size, size, 1) for size in sizes)
        shape = (self.values[x].shape[0], *(max(pair) for pair in zip(sizes, wanted, strict=True)))
        kind = self.pick("feed", "feed", "constant", "same")
        if kind == "same" and qtype is None:
            return x, self.values[x].shape
        if kind == "constant":
            dropped = self.between(0, len(wanted) + 1)
            kept = (1, *wanted)[dropped:]
            seen = (1,) * len(wanted[: max(0, dropped - 1)]) + tuple(wanted[max(0, dropped - 1) :])
            shape = (shape[0], *(max(pair) for pair in zip(sizes, seen, strict=True)))
            return self.constant(kept, qtype or self.qtype()), shape
        return self.feed(wanted, qtype), shape


def or_fit(
    build: Builder, reaches: Sequence[float], qmax: int, mode: str, make: Callable[..., tuple[int, ...]]
) -> tuple[int, ...]:
    """``make(*factors)``, one factor per reach; scales that have no shift give way to factors that fit."""
    headroom = 8.0 if len(reaches) == 1 else 0.5
    try:
        return make(*(build.real(reach, qmax, mode, headroom) for reach in reaches))
    except FactorError:
        return make(*(build.real(reach, qmax, "fit", headroom) for reach in reaches))


def int32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.atleast_1d(np.asarray(values, dtype=np.int64)).astype(np.int32))


def hard_accumulators(rng: np.random.Generator, m: Array, n: Array, low: int, high: int) -> Array:
    """Per channel an accumulator that lands next to a half between codes ``low`` and ``high``.

    Preferred is a tie, or one below 2^24 that a float32 product would put on the wrong side.
    """
    target = 2.0 * np.arange(low, high + 1) + 1
    chosen = []
    for multiplier, shift in zip(np.maximum(m, 1).tolist(), n.tolist(), strict=True):
        near = np.clip(np.rint(target * 2.0 ** (shift - 1) / multiplier), -INT32, INT32 - 1).astype(np.int64)
        wrong = (half_away, single_precision)[rng.integers(2)]
        hard = (half_even(near * multiplier, shift) != wrong(near * multiplier, shift)) & (np.abs(near) < 2**24)
        chosen.append(rng.choice(near[hard] if hard.any() else near))
    return np.array(chosen)
