"""Rounding and saturation over the integers: sections 3 and 4 of ``docs/numerics.md``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Rounding = Callable[[Ints, ArrayLike], Ints]
"""``(numerator, shift) -> integers``: numerator / 2^shift, rounded."""

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def half_even(numerator: Ints, shift: ArrayLike) -> Ints:
    """``rne(numerator / 2^shift)`` by integer arithmetic; ``shift`` in [0, 62] broadcasts."""
    floor, rest, half = _divide(numerator, shift)
    up = (rest > half) | ((rest == half) & (floor % 2 == 1) & (half > 0))
    result: Ints = floor + up
    return result


def half_away(numerator: Ints, shift: ArrayLike) -> Ints:
    """The wrong rule that C's ``round`` follows (halves away from zero), to show that tests tell the two apart."""
    floor, rest, half = _divide(numerator, shift)
    up = (rest > half) | ((rest == half) & (floor >= 0) & (half > 0))
    result: Ints = floor + up
    return result


def single_precision(numerator: Ints, shift: ArrayLike) -> Ints:
    """The wrong way of a float32 product that is rounded where it stands: wrong where it rounds onto or off a half."""
    result: Ints = np.rint(np.ldexp(numerator.astype(np.float32), -np.asarray(shift, dtype=np.int32))).astype(np.int64)
    return result


def sat32(value: Ints) -> Ints:
    """Clamp to int32."""
    return np.clip(value, INT32_MIN, INT32_MAX)


def _divide(numerator: Ints, shift: ArrayLike) -> tuple[Ints, Ints, Ints]:
    """Floor quotient, rest in [0, 2^shift) and 2^(shift - 1) (0 for shift 0).

    With |numerator| < 2^62 and shift <= 62 no intermediate leaves int64: the rest is below 2^62.
    """
    n = np.asarray(shift, dtype=np.int64)
    if n.min() < 0 or n.max() > 62:
        raise ValueError(f"shift {n.min()}..{n.max()} is outside [0, 62]")
    if numerator.size and max(abs(int(numerator.min())), abs(int(numerator.max()))) >= 2**62:
        raise OverflowError("the numerator needs 63 bits or more")
    floor = numerator >> n
    rest = numerator - (floor << n)
    half = np.where(n > 0, np.int64(1) << np.maximum(n - 1, 0), 0)
    return floor, rest, half
