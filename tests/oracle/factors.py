"""Real factors to multipliers and shifts, in exact rationals: sections 3 and 4 of ``docs/numerics.md``.

Python's ``round`` of a Fraction goes to the even neighbour at a half.
"""

from __future__ import annotations

import math
from fractions import Fraction

from .integers import INT32_MAX, INT32_MIN

TINY = Fraction(1, 2**40)
"""A smaller factor moves no code."""
LIMIT = Fraction(2**32 - 1, 2)
"""From here on a number rounds to 2^31, which is no int32."""


class FactorError(ValueError):
    """The factor has no shift in [0, 62]: what ``convert`` reports as QAT171."""


def factor(r: float, bits: int) -> tuple[int, int]:
    """``(M, n)`` of the float64 ``r > 0``: ``M = rne(r * 2^n)`` with exactly ``bits`` bits; raise FactorError."""
    if not (r > 0 and math.isfinite(r)):
        raise FactorError(f"{r!r} is no positive, finite factor")
    n = _shift(Fraction(r), bits)
    if not 0 <= n <= 62:
        raise FactorError(f"{r!r} needs shift {n}, outside [0, 62]")
    return round(Fraction(r) * 2**n), n


def lone_factor(r: float, bits: int) -> tuple[int, int]:
    """:func:`factor` with the sign of ``r``; (0, 0) below 2^-40, and (2^b - 1, 0) where n would be negative."""
    exact = abs(Fraction(r))
    if exact < TINY:
        return 0, 0
    n = _shift(exact, bits)
    m = 2**bits - 1 if n < 0 else factor(float(exact), bits)[0]
    return (m if r > 0 else -m), max(n, 0)


def sum_factor(r1: float, r2: float, bits: int, reach: tuple[int, int], qmin_y: int) -> tuple[int, int, int]:
    """``(M1, M2, n)`` of a sum of two terms; ``reach`` are the X = -qmin of both. Raises FactorError (QAT171)."""
    sizes = [abs(Fraction(r)) for r in (r1, r2)]
    if min(sizes) < TINY:
        m, n = lone_factor(max(r1, r2, key=lambda r: abs(Fraction(r))), bits)
        return (0, m, n) if sizes[0] < TINY else (m, 0, n)
    small = 0 if sizes[0] <= sizes[1] else 1
    p, larger = sizes[small], sizes[1 - small]
    g = min(larger, 2 * (-qmin_y + reach[small] * p))
    n = max(0, _fitting(g, _shift(p, bits)))
    if g * 2**n >= LIMIT:
        raise FactorError(f"{float(g)!r} does not fit an int32 multiplier")
    made = [_significant(p * 2**n, bits), _significant(g * 2**n, bits)]
    m1, m2 = made if small == 0 else made[::-1]
    return (m1 if r1 > 0 else -m1), (m2 if r2 > 0 else -m2), n


def addend_factor(r1: float, r2: float, bits: int) -> tuple[int, int, int]:
    """``(M1, M2, n)`` of an accumulator with the factor ``r1`` and an addend with ``r2``; raises FactorError."""
    if Fraction(r1) < TINY:
        return (0, *lone_factor(r2, bits))
    m1, alone = lone_factor(r1, bits)
    n = _fitting(Fraction(r2), alone)
    if n < 0:
        raise FactorError(f"{r2!r} does not fit an int32 multiplier")
    return m1 if n == alone else round(Fraction(r1) * 2**n), _significant(Fraction(r2) * 2**n, bits), n


def signed_pair(r: float, r_negative: float, bits: int) -> tuple[int, int, int]:
    """``(M, negative M, n)`` of a leaky relu: the larger magnitude fixes n, the other is ``rne(r * 2^n)``."""
    _, n = factor(max(r, abs(r_negative)), bits)
    return round(Fraction(r) * 2**n), round(Fraction(r_negative) * 2**n), n


def mantissa_exponent(scale: float) -> tuple[int, int]:
    """``(m, k)`` with ``scale = m * 2^k`` and m odd."""
    exact = Fraction(scale)
    k = -(exact.denominator.bit_length() - 1)
    m = exact.numerator
    while m % 2 == 0:
        m, k = m // 2, k + 1
    return m, k


def compare_factors(scales: tuple[float | None, float | None]) -> tuple[list[int], list[int]]:
    """``(m, e)`` of the two sides of a comparison; a scale of None stands for an input without one."""
    parts = [(1, 0) if s is None else mantissa_exponent(s) for s in scales]
    lowest = min(k for _, k in parts)
    return [m for m, _ in parts], [min(64, k - lowest) for _, k in parts]


def _shift(r: Fraction, bits: int) -> int:
    """n of section 3 for ``r > 0``, negative where that is outside of what is allowed."""
    n = 0
    while r * Fraction(2) ** n >= 2**bits:
        n -= 1
    while r * Fraction(2) ** n < 2 ** (bits - 1):
        n += 1
    return n - 1 if round(r * Fraction(2) ** n) == 2**bits else n


def _fitting(r: Fraction, n: int) -> int:
    """The largest shift not above ``n`` for which ``r * 2^shift < 2^31 - 1/2``."""
    while r * Fraction(2) ** n >= LIMIT:
        n -= 1
    return n


def _significant(value: Fraction, bits: int) -> int:
    """``value >= 0`` rounded half to even to an integer of at most ``bits`` significant bits, and below 2^31."""
    beyond = max(0, round(value).bit_length() - bits)
    largest = int(2**bits - 1) << (31 - bits)
    rounded: int = round(value / 2**beyond) << beyond
    return min(rounded, largest)


def bias_codes(bias: float, s_x: float, s_w: float) -> int:
    """``sat32(rne(b / (s_x * s_w)))``, product and quotient in float64."""
    return min(max(round(float(bias) / (float(s_x) * float(s_w))), INT32_MIN), INT32_MAX)


def clamp_codes(low: float, high: float, s_y: float, qmin: int, qmax: int) -> tuple[int, int]:
    """Output clamp of ``clamp(low, high)`` at scale ``s_y``, quotients in float64; infinities leave a side open."""
    lo = qmin if low == -math.inf else max(qmin, round(float(low) / float(s_y)))
    hi = qmax if high == math.inf else min(qmax, round(float(high) / float(s_y)))
    return lo, hi
