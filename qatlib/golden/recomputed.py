"""Causes that are decided by computing the op again, from its golden inputs, as a device may have done it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from qatlib.golden.causes import FEWEST, Cause, Parted
from qatlib.golden.rounding import RULES, Unrounded
from qatlib.golden.vectors import Array
from qatlib.qtype import limits

NARROW = (16, 24, 32)
"""Bits of the accumulators that are tried."""
Way = Callable[[Unrounded], Array]
"""What a device made of the value before rounding."""


def done_otherwise(part: Parted) -> Iterator[Cause]:
    """Another rounding, operand or saturation that gives the device's number at every element."""
    step = part.step
    if step is None:
        return
    few, there = step.at(part.got.shape, part.some), part.got.flat[part.some]
    found: dict[str, list[str]] = {}
    for kind, how, way in _ways(part, step):
        if np.array_equal(way(few), there) and part.reproduces(way(step)):
            found.setdefault(kind, []).append(how)
    for kind, ways in found.items():
        said = " or ".join(ways)
        text = f"{kind}: recomputed with {said}, every element equals the device"
        if kind == "rounding":
            text += "; the contract rounds half to even"
        yield Cause(kind, text, {"recomputed": said, **_counts(part, step)})


def _ways(part: Parted, step: Unrounded) -> Iterator[tuple[str, str, Way]]:
    for name, rule in RULES.items():
        yield "rounding", name, partial(Unrounded.codes, rule=rule)
    for name in step.others:
        yield "rounding", name, partial(Unrounded.other, name=name)
    if not step.inexact:
        yield "rounding", "product in float32", Unrounded.in_single
    if len(step.terms) > 1:
        yield "rounding", "each term rounded before they are added", Unrounded.rounded_apart
    if step.bias is not None:
        yield "operand", "no bias", Unrounded.without_bias
    for i, name in enumerate(step.names if len(step.terms) > 1 else ()):
        yield "operand", f"all but {name}", partial(Unrounded.without, index=i)
    if part.quantized:
        lo, hi = limits(part.entry.dtype)
        how = f"codes that wrap modulo {hi - lo + 1} where they should saturate"
        yield "saturation", how, partial(Unrounded.wrapped, lo=lo, hi=hi)
        if (step.lo, step.hi) != (lo, hi):
            how = f"the clamp [{lo}, {hi}] for [{step.lo}, {step.hi}] (a fused activation that is not applied)"
            yield "saturation", how, partial(Unrounded.clamped, lo=lo, hi=hi)
    for bits in NARROW if step.sums else ():
        for wraps, does in ((True, "wraps"), (False, "saturates")):
            how = f"an accumulator that {does} at {bits} bits"
            yield "saturation", how, partial(Unrounded.narrowed, bits=bits, wraps=wraps)


def _counts(part: Parted, step: Unrounded) -> dict[str, int]:
    up, down = (int((part.distance * sign > 0).sum()) for sign in (1, -1))
    return {"up": up, "down": down, "at_ties": int((step.at_ties() & part.differs).sum())}


def another_factor(part: Parted) -> Iterator[Cause]:
    """One k, or one for each factor of the op, for which ``rne(k * value before rounding)`` is the device's code
    throughout: multipliers, shifts and scales that are not the golden ones, or were rounded.
    """
    step = part.step
    if step is None or not part.whole:
        return
    rank, count, varied = part.got.ndim, int(part.differs.sum()), len(np.unique(part.want[part.differs])) >= FEWEST
    shape = (1,) * (rank - step.factors[0].ndim) + step.factors[0].shape
    own = tuple(axis for axis in range(rank) if shape[axis] == 1)
    least, most = step.at(part.got.shape, part.some).factors_within(part.got.flat[part.some], (0,))
    for shared in (() if least > most else (tuple(range(rank)),)) + (own,):
        least, most = step.factors_within(part.got, shared)
        if not (least <= most).all() or not (most > 0).all():
            continue
        other = (least > 1) | (most < 1)
        if not other.any():
            yield _next_to_halves(step, count)
        elif varied and count >= FEWEST * int(other.sum()):
            yield _scale(least[other], most[other], least.size)
        return


def _next_to_halves(step: Unrounded, count: int) -> Cause:
    if step.inexact:
        text = "float arithmetic: only values that float32 cannot tell from one between two codes differ"
        return Cause("float_rounding", text, {"differing": count})
    text = "rounding: only values exactly between two codes differ, by no one rule; the contract rounds half to even"
    return Cause("rounding", text, {"at_ties": count})


def _scale(least: Array, most: Array, channels: int) -> Cause:
    """``least`` and ``most`` of the factors that are not 1."""
    middles = np.where(np.isinf(most), least, np.where(least <= 0, most, (least + most) / 2))
    low, high, k = float(least.max()), float(most.min()), float(middles.flat[0])
    if channels > 1:
        low, high = float(middles.min()), float(middles.max())
        named = f"a factor each for {least.size} of {channels} channels, {low:.6g} to {high:.6g},"
        evidence = {"channels": int(least.size), "factor_min": low, "factor_max": high}
    else:
        power = round(float(np.log2(k)))
        named, evidence = f"{k:.6g}", {"factor": k, "factor_min": low, "factor_max": high}
        if low <= 2.0**power <= high:
            named = f"2^{power} (a shift that is {abs(power)} too {'small' if power > 0 else 'large'})"
            evidence["factor"] = 2.0**power
    text = f"scale: the values before rounding times {named} round to the device's codes everywhere"
    return Cause("scale", text, evidence)
