"""Causes in front of the network: pre-processing, geometry, the wrong image.

Numbers are compared as real numbers: an input as given, or codes times their scale where only those were dumped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import torch
from torch.nn import functional as F

from qatlib.golden.causes import Cause, Parted, Test
from qatlib.golden.codes import VARIED
from qatlib.golden.vectors import Array, Golden
from qatlib.qtype import limits

LEAST_R2 = 0.98
"""Share of the variance that a fit has to explain."""
MOST_SHIFT = 8
UNRELATED = 0.5
"""Correlation with every golden sample below which a sample is none of them."""
UNEQUAL = 0.25
"""The same of the share of equal integers."""
FEW = 32
"""Elements of a sample from which on a correlation below :data:`UNRELATED` tells something."""
ALIKE = 0.95


def _views(part: Parted) -> Iterator[tuple[str, Array]]:
    """The device's numbers as they are, and read channels last."""
    yield "", part.got
    if part.got.ndim > 2:
        batch, channels, *space = part.got.shape
        yield "stored channels last, ", np.moveaxis(part.got.reshape(batch, *space, channels), -1, 1)


def _orders(channels: int) -> list[tuple[int, ...]]:
    """Orders of the channels, the golden one first; all of them for up to 4 channels."""
    straight = tuple(range(channels))
    return list(permutations(straight)) if channels <= 4 else [straight, straight[::-1]]


def channel_order(part: Parted) -> Iterator[Cause]:
    """RGB against BGR and the like."""
    if part.got.ndim < 3 or part.got.shape[1] < 2:
        return
    for how, view in _views(part):
        for order in _orders(view.shape[1]):
            if list(order) != sorted(order) and np.array_equal(view, part.want[:, list(order)]):
                name = " (RGB for BGR)" if order == (2, 1, 0) else ""
                text = f"channel order: {how}the device's channels are the golden channels {list(order)}{name}"
                yield Cause("channel_order", text, {"order": str(list(order))})
                return


def moved(part: Parted) -> Iterator[Cause]:
    """A mirrored or shifted image; of a shifted one only the part that both hold can be compared."""
    if part.got.ndim != 4:
        return
    for how, view in _views(part):
        for axes, name in (((3,), "left to right"), ((2,), "top to bottom"), ((2, 3), "by half a turn")):
            if np.array_equal(view, np.flip(part.want, axes)):
                yield Cause("geometry", f"geometry: {how}the image is mirrored {name}", {"axes": str(axes)})
                return
        for dy, dx in _shifts(view.shape[2], view.shape[3]):
            mine, golden = _overlap(view, dy, dx), _overlap(part.want, -dy, -dx)
            if np.array_equal(mine, golden) and len(np.unique(golden)) >= VARIED:
                text = f"geometry: {how}the image is shifted by {dy} rows and {dx} columns (another crop)"
                yield Cause("geometry", text, {"rows": dy, "columns": dx})
                return


def _shifts(height: int, width: int) -> Iterator[tuple[int, int]]:
    rows, columns = (range(-min(MOST_SHIFT, size // 2), min(MOST_SHIFT, size // 2) + 1) for size in (height, width))
    pairs = ((dy, dx) for dy in rows for dx in columns if dy or dx)
    yield from sorted(pairs, key=lambda pair: abs(pair[0]) + abs(pair[1]))


def _overlap(x: Array, dy: int, dx: int) -> Array:
    height, width = x.shape[2:]
    return x[:, :, max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)]


def normalization(part: Parted) -> Iterator[Cause]:
    """Device = a * golden + b for real numbers, one pair for the tensor or one per channel."""
    if part.source_known or not (part.entry.is_float or part.entry.kind == "quantize"):
        return
    best: tuple[float, Cause] | None = None
    for how, view in _views(part):
        for order in _orders(view.shape[1]) if view.ndim > 2 else [()]:
            want = part.want[:, list(order)] if order else part.want
            for per_channel in (False, True) if view.ndim > 2 else (False,):
                fitted = _fitted(part, view, want, per_channel)
                if fitted is None:
                    continue
                r2, a, b = fitted
                cause = _normalization_cause(how, order, r2, a, b)
                if best is None or r2 > best[0] + 1e-3:
                    best = r2, cause
    if best:
        yield best[1]
    else:
        yield from _overdriven(part)


def _fitted(part: Parted, got: Array, want: Array, per_channel: bool) -> tuple[float, Array, Array] | None:
    """(R², a, b) of least squares if they explain the numbers up to quantization, else None."""
    unit = part.entry.scale if part.entry.kind == "quantize" and part.entry.scale else 0.0
    lo, hi = limits(part.entry.dtype) if unit else (float(np.min(got)), float(np.max(got)))
    used = np.isfinite(got.astype(np.float64)) & (got > lo) & (got < hi)
    if unit:
        used &= (want > lo) & (want < hi)
    rounded = 1.0 if part.whole and not unit else 0.0
    y, x = (array.astype(np.float64) * (unit or 1.0) for array in (got, want))
    groups = range(got.shape[1]) if per_channel else [slice(None)]
    a, b, rest, total = [], [], 0.0, 0.0
    for group in groups:
        at = used[:, group] if got.ndim > 1 else used
        gx, gy = (x[:, group][at], y[:, group][at]) if got.ndim > 1 else (x[at], y[at])
        if len(np.unique(gx)) < VARIED or gy.std() == 0:
            return None
        slope, intercept = np.polyfit(gx, gy, 1)
        error = np.abs(gy - slope * gx - intercept)
        if error.max() > 0.6 * unit * (1 + abs(slope)) + rounded + 1e-3 * float(np.abs(gy).max()):
            return None
        a.append(slope)
        b.append(intercept)
        rest, total = rest + float((error**2).sum()), total + float(((gy - gy.mean()) ** 2).sum())
    r2 = 1 - rest / total
    if used.mean() < 0.3 or r2 < LEAST_R2:
        return None
    same = np.allclose(a, 1, atol=1e-3) and np.allclose(b, 0, atol=1e-3 * max(1e-9, float(np.abs(y).max())))
    return None if same else (r2, np.array(a), np.array(b))


def _normalization_cause(how: str, order: tuple[int, ...], r2: float, a: Array, b: Array) -> Cause:
    b = np.where(np.abs(b) < 1e-5 * np.abs(a).max(), 0.0, b)
    slopes, offsets = ([float(f"{v:.4g}") for v in values] for values in (a, b))
    shown = (f"{slopes[0]:g}", f"{offsets[0]:g}") if len(slopes) == 1 else (str(slopes), str(offsets))
    swapped = f"channels in the order {list(order)}, " if list(order) != sorted(order) else ""
    mean = float(np.mean(a))
    if np.allclose(a, 255, rtol=0.02) or np.allclose(a, 1 / 255, rtol=0.02):
        what = f"the range is 0..255 on {'the device' if mean > 1 else 'the golden side'} and 0..1 on the other"
    elif len(slopes) > 1 or np.abs(b).max() > 1e-2 * max(1e-9, abs(mean)):
        what = "a normalization (x - mean) / std is missing or another one"
    else:
        what = "the input, or the scale that quantizes it, is off by a factor"
    text = f"pre-processing: {how}{swapped}device = {shown[0]} * golden + {shown[1]}: {what}"
    return Cause("pre-processing", text, {"a": shown[0], "b": shown[1], "r2": r2})


def _overdriven(part: Parted) -> Iterator[Cause]:
    """Codes mostly at the limits where the golden ones are not: a range that the scale does not cover."""
    if part.entry.kind != "quantize":
        return
    at_limit = [float(np.isin(x, limits(part.entry.dtype)).mean()) for x in (part.got, part.want)]
    if at_limit[0] < 0.5 or at_limit[1] > 0.1:
        return
    text = f"pre-processing: {at_limit[0]:.0%} of the device's codes are at a limit (golden {at_limit[1]:.0%}): "
    evidence: dict[str, float | int | str] = {"device_at_limit": at_limit[0], "golden_at_limit": at_limit[1]}
    yield Cause("pre-processing", text + "its input has a larger range, such as 0..255 for 0..1", evidence)


def unrelated(part: Parted) -> Iterator[Cause]:
    """Numbers that have nothing to do with any golden sample: not correlated, or, of integers, hardly ever equal."""
    if not part.is_input or part.source_known or not part.finite or part.got.ndim < 2 or part.entry.batch_axis != 0:
        return
    rows, pool = (x.astype(np.float64).reshape(len(x), -1) for x in (part.got, part.golden.tensors[part.entry.name]))
    if part.entry.dtype == "int32":
        name, limit, table = "share of equal elements", UNEQUAL, np.array([(pool == row).mean(1) for row in rows])
    elif rows.shape[1] >= FEW:
        rows, pool = (x - x.mean(1, keepdims=True) for x in (rows, pool))
        norms = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(pool, axis=1)[None]
        table = np.divide(rows @ pool.T, norms, out=np.zeros_like(norms), where=norms > 0)
        name, limit = "correlation", UNRELATED
    else:
        return
    closest = float(table.flat[np.abs(table).argmax()])
    if abs(closest) < limit:
        text = f"wrong input: no sample is like any golden one (largest {name} {closest:.2f})"
        yield Cause("wrong_input", text, {f"largest_{name.replace(' ', '_')}": closest})


INPUTS: tuple[Test, ...] = (channel_order, moved, normalization)


def other_size(golden: Golden, name: str, array: Array) -> Cause | None:
    """An image of another size: a window of the golden one, the golden one with a border, or a resized one."""
    want = golden.tensors[name]
    if want.ndim != 4 or array.ndim != 4:
        return None
    for view in (array, np.moveaxis(array, -1, 1)):
        if view.shape[1] != want.shape[1] or len(view) > len(want) or 0 in view.shape:
            continue
        sizes = f"{view.shape[2]}×{view.shape[3]} for {want.shape[2]}×{want.shape[3]}"
        for large, small, what in (
            (want[: len(view)], view, "cropped: a window of the golden image"),
            (view, want[: len(view)], "not cropped, or padded: the golden image is a window of the device's"),
        ):
            at = _window(large, small)
            if at is not None:
                text = f"geometry: the image is {what}, {sizes}"
                return Cause("geometry", text, {"row": at[0], "column": at[1]})
        if view.shape == want[: len(view)].shape:
            continue
        resized = F.interpolate(
            torch.from_numpy(view.astype(np.float32)), want.shape[2:], mode="bilinear", antialias=True
        ).numpy()
        alike = float(np.corrcoef(resized.ravel(), want[: len(view)].astype(np.float32).ravel())[0, 1])
        if alike >= ALIKE:
            text = f"geometry: the image is not resized as the golden one, {sizes}"
            return Cause("geometry", text, {"correlation_when_resized": alike})
    return None


def _window(large: Array, small: Array) -> tuple[int, int] | None:
    """Where ``small`` lies in ``large``, or None."""
    spare = [large.shape[axis] - small.shape[axis] for axis in (2, 3)]
    if min(spare) < 0 or max(spare) == 0:
        return None
    for row in range(spare[0] + 1):
        for column in range(spare[1] + 1):
            if np.array_equal(large[:, :, row : row + small.shape[2], column : column + small.shape[3]], small):
                return row, column
    return None
