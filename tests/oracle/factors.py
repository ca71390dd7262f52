"""Real factors to multipliers and shifts, in exact rationals: section 3 of ``docs/numerics.md``.

Python's ``round`` of a Fraction goes to the even neighbour at a half.
"""

from __future__ import annotations

import math
from fractions import Fraction

from .integers import INT32_MAX, INT32_MIN


class FactorError(ValueError):
    """The factor has no shift in [0, 62]: what ``convert`` reports as QAT171."""


def factor(r: float, bits: int) -> tuple[int, int]:
    """``(M, n)`` of the float64 ``r > 0``: ``M = rne(r * 2^n)`` with exactly ``bits`` bits; raise FactorError."""
    if not (r > 0 and math.isfinite(r)):
        raise FactorError(f"{r!r} is no positive, finite factor")
    exact = Fraction(r)
    n = 0
    while exact * Fraction(2) ** n >= 2**bits:
        n -= 1
    while exact * Fraction(2) ** n < 2 ** (bits - 1):
        n += 1
    m = round(exact * Fraction(2) ** n)
    if m == 2**bits:
        m, n = 2 ** (bits - 1), n - 1
    if not 0 <= n <= 62:
        raise FactorError(f"{r!r} needs shift {n}, outside [0, 62]")
    return m, n


def joint_factor(r1: float, r2: float, bits: int) -> tuple[int, int, int]:
    """``(M1, M2, n)``: the larger factor fixes n by :func:`factor`, the other is ``rne(r * 2^n)``."""
    _, n = factor(max(r1, r2), bits)
    return round(Fraction(r1) * 2**n), round(Fraction(r2) * 2**n), n


def bias_codes(bias: float, s_x: float, s_w: float) -> int:
    """``sat32(rne(b / (s_x * s_w)))``, product and quotient in float64."""
    return min(max(round(float(bias) / (float(s_x) * float(s_w))), INT32_MIN), INT32_MAX)


def clamp_codes(low: float, high: float, s_y: float, qmin: int, qmax: int) -> tuple[int, int]:
    """Output clamp of ``clamp(low, high)`` at scale ``s_y``, quotients in float64; infinities leave a side open."""
    lo = qmin if low == -math.inf else max(qmin, round(float(low) / float(s_y)))
    hi = qmax if high == math.inf else min(qmax, round(float(high) / float(s_y)))
    return lo, hi
