"""Which causes are tried for a tensor, in which order, and what is said if none explains it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qatlib.golden import codes, inputs, recomputed
from qatlib.golden.causes import Cause, Parted, Test

ALONE: tuple[Test, ...] = (
    codes.float_rounding,
    codes.batch_order,
    codes.sign,
    codes.saturation,
    codes.constant_offset,
    codes.scale_fit,
)


def explain(part: Parted) -> tuple[Cause, ...]:
    """Causes that explain every differing element, the most specific first; none if there is none.

    What is explained without a free number is not also looked for with one, nor what the golden inputs of the op
    explain in the numbers alone.
    """
    exact = (codes.constant,), (recomputed.done_otherwise,), (codes.not_rounded,)
    fitted = (*(inputs.INPUTS if part.is_input else ()), recomputed.another_factor)
    for tests in (*exact, fitted, ALONE):
        found: dict[str, Cause] = {}
        for test in tests:
            for cause in test(part):
                found.setdefault(cause.kind, cause)
        if found:
            return tuple(found.values())
    return _behind(part)


def unexplained(part: Parted) -> Cause:
    """What is said where nothing explains the numbers."""
    return next(inputs.unrelated(part), None) or unknown(part)


def _behind(part: Parted) -> tuple[Cause, ...]:
    """Causes at the accumulator or codes that a ``dequantize`` read, where the dump does not hold these."""
    lsb = part.golden.lsb(part.entry.name)
    if lsb is None or part.source_known or not part.finite:
        return ()
    numbers = np.rint(part.got / lsb)
    if np.abs(part.got / lsb - numbers).max() > 0.05:
        return ()
    name, count = part.entry.inputs[0], part.samples
    source = Parted(part.golden, part.golden.by_name[name], numbers, part.golden.samples(name, count), count)
    return tuple(replace(cause, text=f"{cause.text} (of {name}, which it reads)") for cause in explain(source))


def unknown(part: Parted) -> Cause:
    """Where and how the numbers differ, for people to go on with."""
    moved, distance = part.differs, part.distance
    got, want = part.got.astype(np.float64).ravel(), part.want.astype(np.float64).ravel()
    known = distance[np.isfinite(distance)]
    evidence: dict[str, float | int | str] = {
        "mean_signed_distance": float(known.mean()) if known.size else 0.0,
        "share_above": float((distance > 0).mean()),
        "share_below": float((distance < 0).mean()),
        "not_finite": int((~np.isfinite(got)).sum()),
    }
    if part.finite and got.std() > 0 and want.std() > 0:
        evidence["correlation"] = float(np.corrcoef(got, want)[0, 1])
    if moved.ndim > 1:
        channels = np.flatnonzero(moved.any(axis=tuple(axis for axis in range(moved.ndim) if axis != 1)))
        evidence["channels_differing"] = f"{len(channels)} of {moved.shape[1]}, first {channels[0]}"
    if moved.ndim > 2 and min(moved.shape[2:]) > 2:
        inner = moved[(slice(None), slice(None), *(slice(1, -1) for _ in moved.shape[2:]))]
        evidence["share_at_border"] = 1.0 - float(inner.sum()) / float(moved.sum())
    text = "unknown: no layout, rounding, saturation, scale or input explains the numbers"
    if part.entry.kind == "float_op":
        text += " (a float island: the device's float kernel may compute it otherwise than torch)"
    elif part.step is not None:
        text += " (recomputed from its golden inputs, no other rounding, clamp, operand or factor fits either)"
    return Cause("unknown", text, evidence)
