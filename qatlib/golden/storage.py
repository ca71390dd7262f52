"""How a device stored a tensor: dtype and byte order, encoding of the codes, layout.

None of these changes what was computed. A dump is compared after its storage is undone: the one that makes it equal if
there is one. For a tensor that differs anyway, a storage that neither torch nor a tensor before it has is believed only
if little distance is left (so that a rounding error in a tensor stored channels last is found as such), or if it lets a
cause explain every number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qatlib.golden.dump import Dumped
from qatlib.golden.layout import Layout, describe_layout, layouts, usual_layouts
from qatlib.golden.vectors import Array, Entry, Golden

WIDER = ("int16", "int32", "int64", "float16", "float32", "float64", "uint8")
NEAR = 0.25
"""Mean distance, in mean deviations of the golden numbers, up to which another storage is believed."""
BETTER = 0.5
"""Part of the distance that the plain storage leaves, up to which another storage is believed."""
PROBE = 1 << 12
"""Elements looked at before all of them are."""


@dataclass(frozen=True)
class Storage:
    """``dtype`` and ``encoding`` are empty where they are the golden ones; ``big_endian`` of values over one byte."""

    layout: Layout
    dtype: str = ""
    big_endian: bool = False
    encoding: str = ""

    @property
    def plain(self) -> bool:
        return self.layout.plain and not (self.dtype or self.big_endian or self.encoding)


@dataclass(frozen=True)
class Match:
    """A dumped tensor read in one way: ``stored`` numbers in golden axes, beside as many golden samples."""

    storage: Storage
    entry: Entry
    samples: int
    stored: Array
    want: Array
    lsb: Array | None

    def read(self, at: tuple[Any, ...] = (...,)) -> Array | None:
        """The part ``at`` in the unit of the golden numbers; None if it cannot be of that encoding."""
        lsb = None if self.lsb is None else np.broadcast_to(self.lsb, self.want.shape)[at]
        got = _decode(self.stored[at], self.entry, self.storage.encoding, lsb)
        return got if got is None or not self.entry.is_float else got.astype(np.float32)

    @cached_property
    def got(self) -> Array:
        found = self.read()
        assert found is not None
        return found

    @cached_property
    def count(self) -> int:
        """Number of elements that differ."""
        return int(_differing(self.got, self.want).sum())

    @cached_property
    def equal(self) -> bool:
        return self.apart == 0 and self.read() is not None and self.count == 0

    @cached_property
    def apart(self) -> float:
        """Mean distance in mean deviations of the golden numbers, of at most :data:`PROBE` elements; inf if unreadable.

        What is not finite is as far as the largest golden number.
        """
        at = _spread(self.want.shape)
        got = self.read(at)
        if got is None:
            return np.inf
        differing, want = _differing(got, self.want[at]), self.want[at].astype(np.float64)
        if not differing.any():
            return 0.0
        away = np.abs(got.astype(np.float64) - want)
        away = np.where(np.isfinite(away), away, np.abs(want).max()).mean()
        deviation = np.abs(want - want.mean()).mean()
        return float(away / deviation) if deviation > 0 else np.inf

    @cached_property
    def varied(self) -> bool:
        """Whether the golden numbers are so many that a reading cannot be near them by chance."""
        return len(np.unique(self.want[_spread(self.want.shape)])) >= 8

    @cached_property
    def telling(self) -> bool:
        """Whether the golden numbers are so uneven that a reading cannot be equal to them by chance."""
        counts = np.unique(self.want[_spread(self.want.shape)], return_counts=True)[1]
        return int(counts.sum() - counts.max()) >= 4


def fit(dumped: Dumped, golden: Golden, entry: Entry, seen: list[Storage]) -> list[Match]:
    """Readings of ``dumped`` as tensor ``entry``: the one that is equal, or else all worth a look, likeliest first.

    Empty if its size fits no storage. ``seen`` are storages of tensors before this one.
    """
    tried: list[Match] = []
    for storage in (Storage(usual_layouts(entry)[0]), *seen):
        for match in _readings(dumped, golden, entry, storage, strict=False):
            if match.equal:
                return [match]
            tried += [] if match.read() is None else [match]
    tried.sort(key=lambda match: match.apart)
    limit = min([NEAR, *(BETTER * match.apart for match in tried)])
    nearest: Match | None = None
    usual: list[Match] = []
    for storage in _candidates(dumped, golden, entry):
        for match in _readings(dumped, golden, entry, storage, strict=bool(tried)):
            if match.equal and (match.telling or not tried):
                return [match]
            if match.varied and match.apart < limit and match.read() is not None:
                nearest, limit = match, match.apart
            if _worth_a_look(dumped, golden, match, bool(tried)):
                usual.append(match)
    first = [] if nearest is None else [nearest]
    return [*first, *tried, *(match for match in usual if match.storage not in {m.storage for m in (*first, *tried)})]


def _worth_a_look(dumped: Dumped, golden: Golden, match: Match, plain: bool) -> bool:
    """Whether causes are looked for although the numbers are far from the golden ones: in the usual layouts or one that
    the shape of a .npy file tells, as another dtype where a raw file holds the whole batch of it, and with the encoding
    that a dtype tells. ``plain``: whether the plain storage fits as well.
    """
    storage, raw = match.storage, dumped.array is None
    usual = storage.layout in usual_layouts(match.entry)
    if storage.big_endian:
        return False
    if storage.encoding:
        told = not raw and match.stored.dtype.kind != "i"
        return told and storage.layout.plain and match.read() is not None
    if storage.dtype:
        return raw and usual and not (plain and match.samples != golden.batch)
    return usual or (dumped.array is not None and dumped.array.ndim > 1 and not plain)


def _candidates(dumped: Dumped, golden: Golden, entry: Entry) -> Iterator[Storage]:
    """Storages from the likely to the odd."""
    dtypes = ["", *(name for name in WIDER if name != entry.dtype)] if dumped.array is None else ["", "bytes"]
    encodings = ["", "codes"] if entry.is_float else ["", "offset", "unsigned", "dequantized", "truth"]
    merged = golden.by_name[entry.inputs[0]] if entry.kind == "reshape" else None
    for dtype in dtypes:
        for big_endian in (False, True):
            if _flat(dumped, entry, Storage(Layout(()), dtype, big_endian)) is not None:
                for encoding in encodings:
                    for layout in layouts(entry, merged):
                        yield Storage(layout, dtype, big_endian, encoding)


def _flat(dumped: Dumped, entry: Entry, storage: Storage) -> Array | None:
    """Elements in file order, or None if the file cannot hold that dtype. A .npy file tells its dtype itself."""
    wanted = np.dtype(entry.dtype if storage.dtype in ("", "bytes") else storage.dtype)
    if dumped.array is not None and not storage.dtype:
        return None if storage.big_endian else dumped.array.reshape(-1)
    if dumped.array is not None and (storage.dtype != "bytes" or storage.big_endian or wanted == dumped.array.dtype):
        return None
    if len(dumped.data) % wanted.itemsize or (storage.big_endian and wanted.itemsize == 1):
        return None
    return np.frombuffer(dumped.data, wanted.newbyteorder(">" if storage.big_endian else "<"))


def _readings(dumped: Dumped, golden: Golden, entry: Entry, storage: Storage, strict: bool) -> Iterator[Match]:
    flat = _flat(dumped, entry, storage)
    real = flat is not None and flat.dtype.kind == "f"
    if flat is None or real is not {"": real, "dequantized": True}.get(storage.encoding, False):
        return
    seen = dumped.array.shape if dumped.array is not None and not storage.dtype else None
    lsb = golden.lsb(entry.name) if storage.encoding == "codes" else None
    for samples, stored in storage.layout.arranged(flat, entry, golden.batch, seen, strict):
        yield Match(storage, entry, samples, stored, golden.samples(entry.name, samples), lsb)


def _spread(shape: tuple[int, ...]) -> tuple[Any, ...]:
    """An index of at most :data:`PROBE` elements over all of ``shape``."""
    steps = [1] * len(shape)
    while np.prod([-(-size // step) for size, step in zip(shape, steps, strict=True)]) > PROBE:
        axis = max(range(len(shape)), key=lambda axis: shape[axis] / steps[axis])
        steps[axis] *= 2
    return (*(slice(None, None, step) for step in steps), ...)


def _differing(got: Array, want: Array) -> Array:
    """NaN counts as equal to NaN."""
    return np.asarray((got != want) & ~((got != got) & (want != want)))


def _decode(x: Array, entry: Entry, encoding: str, lsb: Array | None) -> Array | None:
    """Stored numbers as golden ones, or None if they cannot be of that encoding."""
    if not encoding:
        return x
    if encoding == "codes":
        return None if lsb is None else x * lsb
    if encoding == "dequantized":
        if entry.scale is None or not np.isfinite(x).all():
            return None
        codes = x.astype(np.float64) / entry.scale
        return np.rint(codes).astype(np.int64) if np.abs(codes - np.rint(codes)).max() < 1e-2 else None
    if encoding == "truth":
        return (x != 0).astype(np.int8) if entry.scale == 1 and np.isin(x, (0, -1, 255)).all() else None
    if entry.dtype not in ("int8", "int16"):
        return None
    half = 128 if entry.dtype == "int8" else 32768
    wide = x.astype(np.int64)
    if wide.size and (wide.min() < -half or wide.max() >= 2 * half):
        return None
    return wide % (2 * half) - half if encoding == "offset" else (wide + half) % (2 * half) - half


def describe(storage: Storage, entry: Entry) -> tuple[str, str]:
    """Kind and sentence of how the device stored a tensor otherwise than the golden vectors."""
    half = 128 if entry.dtype == "int8" else 32768
    read = f"the bytes are those of {entry.dtype}" if storage.dtype == "bytes" else f"stored as {storage.dtype}"
    encoded = {
        "": [],
        "offset": [("zero_point", f"codes are stored with zero point {half} (unsigned)")],
        "unsigned": [("dtype", "two's complement codes are read as unsigned")],
        "dequantized": [("dequantized", f"real numbers are stored, codes times the scale {entry.scale}")],
        "truth": [("dtype", "truth values are stored with all bits set, as 255 or -1")],
        "codes": [("dequantized", "codes are stored where the golden tensor holds real numbers")],
    }[storage.encoding]
    found = [
        *([("byte_order", "big endian")] if storage.big_endian else []),
        *([("dtype", read)] if storage.dtype else []),
        *encoded,
        *describe_layout(storage.layout),
    ]
    return found[0][0] if found else "storage", "; ".join(text for _, text in found)
