"""How a device stored a tensor: dtype and byte order, encoding of the codes, order of the axes and padding.

None of these changes what was computed. A dump is compared after the storage that fits is undone: an exact fit if there
is one, else the one that leaves by far the smallest distance, so that a rounding error in a tensor stored channels last
is found as a rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np

from qatlib.golden.dump import Dumped
from qatlib.golden.vectors import Array, Entry, Golden

WIDER = ("int16", "int32", "int64", "float16", "float32", "float64", "uint8")
BLOCKS = (4, 8, 16, 32)
MOST_PADDING = 64
BETTER = 0.5
"""Another storage is taken for a tensor that differs anyway if it leaves less than this part of the distance."""


@dataclass(frozen=True)
class Layout:
    """``axes`` is the order in which the device stored the golden axes; ``padded`` the golden axis that was padded.

    ``block`` > 0: channels in blocks of that many, innermost (``[N, C/b, ..., b]``).
    """

    axes: tuple[int, ...]
    padded: int | None = None
    block: int = 0

    @property
    def plain(self) -> bool:
        return self.axes == tuple(range(len(self.axes))) and self.padded is None and not self.block


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
    """A dumped tensor in the axis order and unit of the golden one: ``[samples, ...]``, beside the golden samples."""

    storage: Storage
    got: Array
    want: Array
    differing: Array

    @property
    def count(self) -> int:
        return int(self.differing.sum())

    @cached_property
    def distance(self) -> float:
        """Mean distance in the unit of the golden numbers; what is not finite is as far as the largest of those."""
        if self.count == 0:
            return 0.0
        want = self.want.astype(np.float64)
        with np.errstate(invalid="ignore"):
            wide = np.abs(self.got.astype(np.float64) - want)
        return float(np.where(np.isfinite(wide), wide, np.abs(want).max()).mean())


def fit(dumped: Dumped, golden: Golden, entry: Entry, seen: list[Storage], thorough: bool = True) -> Match | None:
    """The storage under which ``dumped`` is nearest to tensor ``entry``; None if its size fits no storage at all.

    ``seen`` are storages of tensors before this one, tried first. Without ``thorough`` only those and the plain one are
    tried for a tensor that differs.
    """
    best: Match | None = None
    plain = Storage(Layout(tuple(range(len(entry.shape)))))
    for storage in (plain, *seen):
        match = _undo(dumped, golden, entry, storage)
        if match is not None and match.count == 0:
            return match
        if match is not None and (best is None or match.distance < BETTER * best.distance):
            best = match
    if not thorough and best is not None:
        return best
    for storage in _candidates(dumped, golden, entry):
        match = _undo(dumped, golden, entry, storage)
        if match is not None and match.count == 0:
            return match
        if match is not None and not storage.encoding and (best is None or match.distance < BETTER * best.distance):
            best = match
    return best


def _candidates(dumped: Dumped, golden: Golden, entry: Entry) -> Iterator[Storage]:
    """Storages from the likely to the odd."""
    dtypes = ["", *(name for name in WIDER if name != entry.dtype)] if dumped.array is None else ["", "bytes"]
    encodings = ["", "codes"] if entry.is_float else ["", "offset", "unsigned", "dequantized"]
    for dtype in dtypes:
        for big_endian in (False, True):
            flat = _flat(dumped, entry, dtype, big_endian)
            if flat is None:
                continue
            for encoding in encodings:
                for layout in _layouts(entry):
                    yield Storage(layout, dtype, big_endian, encoding)


def _layouts(entry: Entry) -> Iterator[Layout]:
    rank = len(entry.shape)
    same, last = tuple(range(rank)), (0, *range(2, rank), 1)
    usual = [same, last] if rank > 2 else [same]
    orders = list(dict.fromkeys([*usual, *(permutations(range(rank)) if rank <= 4 else ())]))
    yield from (Layout(axes) for axes in orders)
    yield from (Layout(axes, axis) for axes in usual for axis in range(1, rank))
    if rank > 2:
        yield from (Layout(same, None, block) for block in BLOCKS)


def _flat(dumped: Dumped, entry: Entry, dtype: str, big_endian: bool) -> Array | None:
    """Elements in file order, or None if the bytes are not of that dtype."""
    if dumped.array is not None and not dtype:
        array = dumped.array.reshape(-1)
        return array.byteswap() if big_endian else array
    wanted = np.dtype(entry.dtype if dtype in ("", "bytes") else dtype)
    if dumped.array is not None and wanted == dumped.array.dtype:
        return None
    if len(dumped.data) % wanted.itemsize or (big_endian and wanted.itemsize == 1):
        return None
    return np.frombuffer(dumped.data, wanted.newbyteorder(">" if big_endian else "<"))


def _undo(dumped: Dumped, golden: Golden, entry: Entry, storage: Storage) -> Match | None:
    flat = _flat(dumped, entry, storage.dtype, storage.big_endian)
    if flat is None or len(storage.layout.axes) != len(entry.shape):
        return None
    seen = dumped.array.shape if dumped.array is not None and not storage.dtype and dumped.array.ndim > 1 else None
    shaped = _arrange(flat, golden, entry, storage.layout, seen)
    got = None if shaped is None else _decode(shaped, golden, entry, storage.encoding)
    if got is None:
        return None
    want = golden.samples(entry.name, len(got) if _batched(entry) else golden.batch)
    got = got[tuple(slice(0, size) for size in want.shape)]
    if entry.is_float:
        with np.errstate(over="ignore"):
            got = got.astype(np.float32)
        return Match(storage, got, want, ~((got == want) | (np.isnan(got) & np.isnan(want))))
    return Match(storage, got, want, got != want)


def _batched(entry: Entry) -> bool:
    return bool(entry.template) and entry.template[0] == -1


def _arrange(flat: Array, golden: Golden, entry: Entry, layout: Layout, seen: tuple[int, ...] | None) -> Array | None:
    """``flat`` in golden axes for as many samples as it holds; None if the number of elements does not fit.

    Padding and blocks have to agree with ``seen``, the shape that a .npy file tells.
    """
    counts = [golden.batch]
    if _batched(entry) and layout.padded is None and not layout.block:
        per_sample = math.prod(entry.shape[1:])
        counts += [flat.size // per_sample] if per_sample and flat.size >= per_sample else []
    for count in counts:
        shape = list(entry.sizes(count))
        if layout.block:
            blocks = -(-shape[1] // layout.block)
            stored = (shape[0], blocks, *shape[2:], layout.block)
            if math.prod(stored) == flat.size and seen in (None, stored):
                whole = np.moveaxis(flat.reshape(stored), -1, 2)
                return whole.reshape(shape[0], blocks * layout.block, *shape[2:])[:, : shape[1]]
            continue
        size = shape[layout.padded] if layout.padded is not None else 0
        if layout.padded is not None:
            rest = math.prod(shape) // max(1, size)
            shape[layout.padded] = flat.size // max(1, rest)
            padding = shape[layout.padded] - size
            if not 0 < padding < MOST_PADDING or shape[layout.padded] % 4:
                continue
        stored = tuple(shape[axis] for axis in layout.axes)
        if math.prod(shape) != flat.size or (layout.padded is not None and seen not in (None, stored)):
            continue
        ordered = flat.reshape(stored).transpose(np.argsort(layout.axes))
        return ordered if layout.padded is None else ordered.take(range(size), axis=layout.padded)
    return None


def _decode(x: Array, golden: Golden, entry: Entry, encoding: str) -> Array | None:
    """Stored numbers as golden ones, or None if they cannot be of that encoding."""
    if not encoding:
        return x
    if encoding == "codes":
        lsb = golden.lsb(entry.name)
        return None if lsb is None or x.dtype.kind == "f" else x * lsb
    if encoding == "dequantized":
        if entry.scale is None or x.dtype.kind != "f" or not np.isfinite(x).all():
            return None
        codes = x.astype(np.float64) / entry.scale
        return np.rint(codes).astype(np.int64) if np.abs(codes - np.rint(codes)).max() < 1e-2 else None
    if x.dtype.kind == "f" or entry.dtype not in ("int8", "int16"):
        return None
    half = 128 if entry.dtype == "int8" else 32768
    wide = x.astype(np.int64)
    if wide.size and (wide.min() < -half or wide.max() >= 2 * half):
        return None
    if encoding == "offset":
        return wide % (2 * half) - half
    return (wide + half) % (2 * half) - half


def describe(match: Match, entry: Entry) -> tuple[str, str]:
    """Kind and sentence of how the device stored a tensor otherwise than the golden vectors."""
    storage, layout = match.storage, match.storage.layout
    kinds, texts = [], []
    if storage.big_endian:
        kinds, texts = ["byte_order"], ["big endian"]
    if storage.dtype:
        read = f"the bytes are those of {entry.dtype}" if storage.dtype == "bytes" else f"stored as {storage.dtype}"
        kinds, texts = [*kinds, "dtype"], [*texts, read]
    if storage.encoding:
        half = 128 if entry.dtype == "int8" else 32768
        kind, text = {
            "offset": ("zero_point", f"codes are stored with zero point {half} (unsigned)"),
            "unsigned": ("dtype", "two's complement codes are read as unsigned"),
            "dequantized": ("dequantized", f"real numbers are stored, codes times the scale {entry.scale}"),
            "codes": ("dequantized", "codes are stored where the golden tensor holds real numbers"),
        }[storage.encoding]
        kinds, texts = [*kinds, kind], [*texts, text]
    if layout.block:
        kinds, texts = [*kinds, "layout"], [*texts, f"channels in blocks of {layout.block}, [N, C/b, ..., b]"]
    if layout.axes != tuple(range(len(layout.axes))):
        letters = axis_names(len(layout.axes))
        order = "".join(letters[axis] for axis in layout.axes)
        kinds, texts = [*kinds, "layout"], [*texts, f"axes are in the order {order}, golden is {letters}"]
    if layout.padded is not None:
        letters = axis_names(len(layout.axes))
        kinds, texts = [*kinds, "padding"], [*texts, f"axis {letters[layout.padded]} is padded"]
    return (kinds[0] if kinds else "storage"), "; ".join(texts)


def axis_names(rank: int) -> str:
    """One letter per axis."""
    return {1: "N", 2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}.get(rank, "ABCDEFGHIJ"[:rank])
