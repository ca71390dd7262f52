"""Causes that are decided by the numbers of the device and the golden ones alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from qatlib.golden.causes import FEWEST, Cause, Parted
from qatlib.golden.vectors import Array
from qatlib.qtype import limits

MOST_ULP = 64
VARIED = 8
"""Distinct golden numbers with which a likeness cannot be due to chance."""
SHORTEST = 4
"""Elements of a sample with which an equal one cannot be due to chance."""


def constant(part: Parted) -> Iterator[Cause]:
    """One number everywhere, where the golden numbers vary."""
    same = [(numbers == numbers.flat[0]).all() for numbers in (part.got, part.want)]
    if part.differs.sum() < FEWEST or same != [True, False]:
        return
    value = float(part.got.flat[0])
    yield Cause(
        "constant",
        f"constant: the device holds {value:g} everywhere: a buffer that was never written, or a factor that leaves "
        "nothing else",
        {"value": value},
    )


def sign(part: Parted) -> Iterator[Cause]:
    """Negated numbers, or truth values that are inverted."""
    got, want = part.got.astype(np.float64), part.want.astype(np.float64)
    negated = np.minimum(-want, limits(part.entry.dtype)[1]) if part.quantized else -want
    truth = part.entry.scale == 1 and bool(np.isin(want, (0, 1)).all())
    for name, numbers in (("negated", negated), ("inverted (1 for 0)", 1 - want)):
        if (name == "negated" or truth) and np.array_equal(got, numbers) and part.differs.sum() >= FEWEST:
            yield Cause("sign", f"sign: the device's numbers are the golden ones {name}", {"differing": got.size})


def saturation(part: Parted) -> Iterator[Cause]:
    """A narrower range; or, where the op cannot be recomputed, codes that wrap at the limits."""
    if not (part.quantized and part.whole):
        return
    lo, hi = limits(part.entry.dtype)
    got, want, moved = part.got.astype(np.int64), part.want.astype(np.int64), part.differs
    at_limits = np.isin(want[moved], (lo, hi)).all() and moved.sum() >= FEWEST and not np.isin(want, (lo, hi)).all()
    if part.step is None and at_limits and (np.sign(got[moved]) == -np.sign(want[moved])).mean() > 0.5:
        yield Cause(
            "saturation",
            "saturation: the device differs only where the golden codes are at a limit, mostly with the other sign, "
            "as codes that wrap do",
            {"differing_at_limits": int(moved.sum()), "limits": f"{lo}, {hi}"},
        )
        return
    low, high = int(got.min()), int(got.max())
    if not np.array_equal(np.clip(want, low, high), got) or len(np.unique(got)) < FEWEST:
        return
    beyond = len(np.unique(want[(want < low) | (want > high)]))
    symmetric = low == -hi and bool((want[moved] == lo).all()) and moved.sum() >= FEWEST
    if beyond >= FEWEST or symmetric:
        yield Cause(
            "saturation",
            f"saturation: the device clips to [{low}, {high}], the golden codes reach [{want.min()}, {want.max()}]",
            {"device_min": low, "device_max": high, "clipped": int(moved.sum())},
        )


def constant_offset(part: Parted) -> Iterator[Cause]:
    """Device = golden + c, seen through the clamp."""
    if part.entry.is_float or not part.whole:
        return
    lo, hi = limits(part.entry.dtype)
    got, want = part.got.astype(np.int64), part.want.astype(np.int64)
    inner = (got > lo) & (got < hi) & (want > lo) & (want < hi)
    steps = np.unique((got - want)[inner])
    if len(steps) != 1 or steps[0] == 0 or len(np.unique(want)) < FEWEST or inner.sum() < VARIED:
        return
    offset = int(steps[0])
    if not part.follows(want + offset):
        return
    kind, named = ("zero_point", "zero point") if part.quantized else ("offset", "offset")
    yield Cause(kind, f"{named}: device = golden {offset:+d} everywhere", {"offset": offset})


def scale_fit(part: Parted) -> Iterator[Cause]:
    """Device = k * golden within what rounding both to codes leaves; or float numbers times k."""
    if not part.finite:
        return
    got, want = part.got.astype(np.float64), part.want.astype(np.float64)
    inner = np.ones(got.shape, dtype=bool)
    if part.quantized:
        lo, hi = limits(part.entry.dtype)
        inner = (got > lo) & (got < hi) & (want > lo) & (want < hi)
        if len(np.unique(got[inner])) < FEWEST or np.abs(got - want).max() <= 1:
            return
    square = float((want[inner] ** 2).sum())
    if len(np.unique(want[inner])) < VARIED or square == 0:
        return
    k = float((want[inner] * got[inner]).sum()) / square
    power = 2.0 ** round(float(np.log2(k))) if k > 0 else k
    k = power if k > 0 and abs(k / power - 1) < 0.01 else k
    if k <= 0 or abs(k - 1) < (0.03 if part.quantized else 1e-4):
        return
    slack = (0.5 if part.whole else 0.0) + (0.5 * k if part.quantized else 0.0)
    slack += (1e-5 if part.entry.is_float else 1e-9) * k * float(np.abs(want).max())
    if not part.follows(k * want, slack):
        return
    shift = f" (2^{round(float(np.log2(k)))})" if k == power else ""
    text = f"scale: device = {k:.6g}{shift} times golden, within rounding"
    yield Cause("scale", text, {"factor": k, "tolerance": slack})


def not_rounded(part: Parted) -> Iterator[Cause]:
    """Real numbers that would round to the golden codes: a device, or a fake-quant run, that computes in float."""
    if not part.quantized or part.whole or not part.finite or part.entry.scale is None:
        return
    lo, hi = limits(part.entry.dtype)
    for unit, name in ((1.0, "codes"), (part.entry.scale, "real numbers")):
        codes = part.got.astype(np.float64) / unit
        if np.abs(np.clip(codes, lo, hi) - part.want).max() <= 0.501:
            yield Cause(
                "dequantized",
                f"float: {name} that were never rounded to codes; rounded, they are the golden codes",
                {"max_distance_lsb": float(np.abs(codes - part.want).max())},
            )
            return


def float_rounding(part: Parted) -> Iterator[Cause]:
    """Float numbers of lower precision, or that differ in the last bits only."""
    if not part.entry.is_float or not part.finite:
        return
    for dtype in (torch.float16, torch.bfloat16):
        if part.reproduces(torch.tensor(part.want).to(dtype).float().numpy()):
            name = str(dtype).removeprefix("torch.")
            yield Cause("float_rounding", f"float precision: the golden numbers, rounded to {name}", {"dtype": name})
            return
    spacing = np.spacing(np.abs(part.want).max(initial=np.float32(0)).astype(np.float32))
    ulp = float((np.abs(part.got.astype(np.float64) - part.want) / spacing).max())
    if ulp <= MOST_ULP:
        text = f"float arithmetic: at most {ulp:.3g} units in the last place of the largest value apart"
        yield Cause("float_rounding", text, {"max_ulp": ulp})


def batch_order(part: Parted) -> Iterator[Cause]:
    """Every sample of the device equals some golden sample. If the op's inputs are right, no other input was read."""
    axis, pool = part.entry.batch_axis, part.golden.tensors[part.entry.name]
    if axis is None or part.entry.template[axis] != -1 or len(np.unique(pool)) < FEWEST:
        return
    keys = [_key(row) for row in np.moveaxis(pool, axis, 0)]
    if len(set(keys)) < len(keys) or pool.size < SHORTEST * len(keys):
        return
    rows = [_key(row) for row in np.moveaxis(part.got, axis, 0)]
    if not set(rows) <= set(keys):
        return
    order = [keys.index(row) for row in rows]
    named = ", ".join(map(str, order[:16]))
    if len(order) > 1 and len(set(order)) == len(order):
        text = "batch order: the device's samples are the golden ones in another order"
        yield Cause("batch_order", text, {"golden_samples": named})
    elif not part.source_known:
        text = f"wrong input: the device's samples are the golden samples {named}"
        yield Cause("wrong_input", text, {"golden_samples": named})


def _key(row: Array) -> bytes:
    return (row.astype(np.float64) + 0.0).tobytes()
