"""Scale ratios to multipliers and shifts, at convert time: sections 3 and 4 of ``docs/numerics.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qatlib.errors import ProgramError

NOTHING = 2.0**-40
"""A factor below moves no code."""


def factor(r: float, bits: int, where: str) -> tuple[int, int]:
    """Multiplier of exactly ``bits`` bits, and shift: ``r`` is about ``M / 2^n``. ProgramError unless 0 <= n <= 62."""
    (multiplier,), shift = factors([r], bits, where)
    return multiplier, shift


def factors(ratios: Sequence[float], bits: int, where: str) -> tuple[list[int], int]:
    """Multipliers that share one shift; the largest ratio has exactly ``bits`` bits."""
    largest = max(ratios)
    if not (math.isfinite(largest) and min(ratios) > 0):
        raise ProgramError("QAT171", where, f"scale ratios {list(ratios)} are not positive and finite", "Recalibrate")
    mantissa, exponent = math.frexp(largest)
    shift = bits - exponent
    if round(math.ldexp(mantissa, bits)) == 1 << bits:
        shift -= 1
    if not 0 <= shift <= 62:
        raise ProgramError(
            "QAT171",
            where,
            f"scale ratio {largest:.6g} needs a shift of {shift}; 0 to 62 can be represented",
            "Bring the scales of its input, weight and output closer together",
        )
    return [round(math.ldexp(r, shift)) for r in ratios], shift


def lone_factor(r: float, bits: int, where: str) -> tuple[int, int]:
    """``(M, n)`` of one term, section 4: no factor is too small or too large for it."""
    if not math.isfinite(r):
        raise ProgramError("QAT171", where, f"scale ratio {r} is not finite", "Recalibrate")
    if r < NOTHING:
        return 0, 0
    if r >= 2.0**bits - 0.5:
        return (1 << bits) - 1, 0
    return factor(r, bits, where)


def fused_factors(r1: float, r2: float, bits: int, where: str) -> tuple[int, int, int]:
    """``(M1, M2, n)`` of an addend fused into an accumulator: section 4 of ``docs/numerics.md``.

    The accumulator's factor ``r1`` is a lone one unless ``r2`` is over 2^11 times larger; the addend's factor keeps
    ``bits`` significant bits below 2^31.
    """
    accumulated, shift = lone_factor(r1, bits, where)
    if accumulated == 0:
        alone, shift = lone_factor(r2, bits, where)
        return 0, alone, shift
    start = shift
    while shift > 0 and math.ldexp(r2, shift) >= 2**31 - 0.5:
        shift -= 1
    if math.ldexp(r2, shift) >= 2**31 - 0.5:
        raise ProgramError(
            "QAT171",
            where,
            f"the scale of the addend is {r2:.6g} times that of the output, beyond int32 multipliers",
            "Bring the scales of its inputs and output closer together",
        )
    addend = round(math.ldexp(r2, shift))
    drop = max(0, addend.bit_length() - bits)
    addend = (
        min(round(math.ldexp(r2, shift - drop)), (1 << bits) - 1 if addend.bit_length() == 31 else 1 << bits) << drop
    )
    return accumulated if shift == start else round(math.ldexp(r1, shift)), addend, shift
