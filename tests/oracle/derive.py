"""Multipliers and shifts as ``docs/numerics.md`` derives them from the scales that a Program states."""

from __future__ import annotations

from collections.abc import Callable

from qatlib.program import Op, Program

from .factors import compare_factors, factor, lone_factor


def derived_factors(program: Program, op: Op) -> dict[str, list[int]]:
    """Constants of ``op`` by role, flat; {} for kinds whose factors depend on more than the scales of the values.

    A sum with an ``alpha`` other than 1 is not written as such, so ``add`` is derived where both terms count once.
    """
    scales = [program.values[name].qtype.scale for name in (*op.inputs, op.output)]
    if op.kind == "compare":
        m, e = compare_factors((scales[0], scales[1]))
        return {"mantissa": m, "exponent": e}
    if op.kind not in RATIOS or "multiplier" not in op.consts or scales[-1] is None:
        return {}
    bits = int(program.meta["multiplier_bits"])
    *known, s_y = [float(s) for s in scales if s is not None]
    pairs = RATIOS[op.kind](op, known, s_y, bits)
    return {"multiplier": [m for m, _ in pairs], "shift": [n for _, n in pairs]}


Pairs = list[tuple[int, int]]


def _lone(op: Op, scales: list[float], s_y: float, bits: int) -> Pairs:
    return [lone_factor(s / s_y, bits) for s in scales]


def _where(op: Op, scales: list[float], s_y: float, bits: int) -> Pairs:
    """The condition comes first."""
    return _lone(op, scales[1:], s_y, bits)


def _mul(op: Op, scales: list[float], s_y: float, bits: int) -> Pairs:
    return [lone_factor(scales[0] * scales[1] / s_y, bits)]


def _sum(op: Op, scales: list[float], s_y: float, bits: int) -> Pairs:
    return [lone_factor(scales[0] / (s_y * op.attrs["divisor"]), bits)]


def _matmul(op: Op, scales: list[float], s_y: float, bits: int) -> Pairs:
    a, b = (s * 2.0**p for s, p in zip(scales, op.attrs["drop"], strict=True))
    return [lone_factor(a * b * op.attrs["factor"] / s_y, bits)]


def _cat(op: Op, scales: list[float], s_y: float, bits: int) -> Pairs:
    return [factor(s / s_y, bits) for s in scales]


RATIOS: dict[str, Callable[[Op, list[float], float, int], Pairs]] = {
    "maximum": _lone,
    "minimum": _lone,
    "where": _where,
    "mul": _mul,
    "sum": _sum,
    "matmul": _matmul,
    "cat": _cat,
}
