"""Lossless code of a section of weights: the smallest of four forms. Every byte is described in ``docs/weights.md``.

A section is a header (form, parameters, bytes of the payload) and a payload. Bits fill a byte from the lowest on, each
run of bits starts in a byte of its own, numbers of several bytes are little endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.signedinteger[Any]]
"""int8 or int16, one axis."""
_Ints = NDArray[np.int64]

Form = Literal["raw", "palette", "rice", "runs"]
FORMS: tuple[Form, ...] = ("raw", "palette", "rice", "runs")
"""By their number in the header; of equally small ones the first is taken."""
HEADER = struct.Struct("<BBI")
_COUNT = struct.Struct("<I")
_PALETTE = 256
"""Values of a palette at most."""


class DamagedSectionError(ValueError):
    """Bytes that no section has; the message completes "the section ..."."""


def encode(codes: Codes) -> bytes:
    """The smallest form of ``codes``."""
    zigzag, count, width = _zigzag(codes), len(codes), codes.itemsize
    values, counts = _histogram(zigzag)
    sizes: dict[Form, int] = {"raw": count * width}
    if 0 < len(values) <= _PALETTE:
        sizes["palette"] = 1 + len(values) * width + _bytes(count * (len(values) - 1).bit_length())
    low, unary = _best_low(values, counts, count, 8 * width)
    sizes["rice"] = _bytes(count * low) + _bytes(unary)
    runs = _Runs.of(zigzag, values, counts, 8 * width)
    if runs is not None:
        sizes["runs"] = runs.size

    form = min(sizes, key=lambda one: (sizes[one], FORMS.index(one)))
    parameters = 0
    if form == "raw":
        payload = codes.astype(codes.dtype.newbyteorder("<")).tobytes()
    elif form == "palette":
        payload = _palette(codes)
    elif form == "rice":
        payload, parameters = _pack(zigzag, low) + _unary(zigzag >> low), low
    else:
        assert runs is not None
        payload, parameters = runs.payload(zigzag), runs.value_low | runs.low << 4
    return HEADER.pack(FORMS.index(form), parameters, len(payload)) + payload


def decode(section: bytes, count: int, dtype: np.dtype[Any]) -> Codes:
    """The ``count`` codes of a whole section; DamagedSectionError if it is none."""
    number, parameters, _ = _header(section)
    payload, width = section[HEADER.size :], dtype.itemsize
    if number >= len(FORMS):
        raise DamagedSectionError(f"is of form {number}, which does not exist")
    form = FORMS[number]
    if parameters and form in ("raw", "palette"):
        raise DamagedSectionError(f"has parameters {parameters}, which {form} does not take")
    if form == "raw":
        if len(payload) != count * width:
            raise DamagedSectionError(f"has {len(payload)} bytes for {count} weights")
        return np.frombuffer(payload, dtype.newbyteorder("<")).astype(dtype)
    if form == "palette":
        return _from_palette(payload, count, dtype)
    if form == "rice":
        zigzag = _from_rice(payload, (count,), (parameters,))[0]
        return _from_zigzag(zigzag, dtype)
    if len(payload) < _COUNT.size:
        raise DamagedSectionError("ends within its header")
    (some,) = _COUNT.unpack_from(payload)
    if some > count:
        raise DamagedSectionError(f"has {some} weights that are not 0, of {count}")
    lengths, found = _from_rice(payload[_COUNT.size :], (some, some), (parameters >> 4, parameters & 15))
    places = np.cumsum(lengths + 1) - 1
    if some and places[-1] >= count:
        raise DamagedSectionError(f"has a weight at {places[-1]}, of {count}")
    whole = np.zeros(count, np.int64)
    whole[places] = found + 1
    return _from_zigzag(whole, dtype)


def split(stream: bytes, count: int) -> list[int]:
    """Where the ``count`` sections of ``stream`` begin, and its end; DamagedSectionError if the last ends elsewhere."""
    ends = [0]
    for _ in range(count):
        *_, size = _header(stream[ends[-1] : ends[-1] + HEADER.size])
        ends.append(ends[-1] + HEADER.size + size)
    if ends[-1] != len(stream):
        raise DamagedSectionError(f"that is the last ends at byte {ends[-1]}, its stream at {len(stream)}")
    return ends


def _header(section: bytes) -> tuple[int, int, int]:
    if len(section) < HEADER.size:
        raise DamagedSectionError("ends within its header")
    number, parameters, size = HEADER.unpack_from(section)
    return number, parameters, size


# -- forms -------------------------------------------------------------------------------------------------------------


def _palette(codes: Codes) -> bytes:
    values, index = np.unique(codes, return_inverse=True)
    bits = (len(values) - 1).bit_length()
    return bytes([len(values) - 1]) + values.astype(codes.dtype.newbyteorder("<")).tobytes() + _pack(index, bits)


def _from_palette(payload: bytes, count: int, dtype: np.dtype[Any]) -> Codes:
    size = payload[0] + 1 if payload else 1
    bits, start = (size - 1).bit_length(), 1 + size * dtype.itemsize
    if len(payload) != start + _bytes(count * bits):
        raise DamagedSectionError(f"has {len(payload)} bytes for {count} weights of a palette of {size}")
    values = np.frombuffer(payload[1:start], dtype.newbyteorder("<")).astype(dtype)
    index = _unpack(payload[start:], count, bits)
    if count and index.max() >= size:
        raise DamagedSectionError(f"takes value {index.max()} of a palette of {size}")
    return values[index]


@dataclass(frozen=True)
class _Runs:
    """Weights that are not 0, at ``places``, with the zeros before each; low bits of both; bytes of the payload."""

    places: _Ints
    lengths: _Ints
    low: int
    value_low: int
    size: int

    @staticmethod
    def of(zigzag: _Ints, values: _Ints, counts: _Ints, bits: int) -> _Runs | None:
        """None where fewer than a sixteenth of the weights are 0: the form then saves nothing worth looking for."""
        zeros = int(counts[0]) if len(values) and values[0] == 0 else 0
        if 16 * zeros < len(zigzag):
            return None
        some = len(zigzag) - zeros
        skip = int(zeros > 0)
        value_low, value_unary = _best_low(values[skip:] - 1, counts[skip:], some, bits)
        places = np.flatnonzero(zigzag)
        lengths = np.diff(places, prepend=-1) - 1
        low, unary = _best_low(*_histogram(lengths), some, 16)
        size = _COUNT.size + _bytes(some * low) + _bytes(some * value_low) + _bytes(unary + value_unary)
        return _Runs(places, lengths, low, value_low, size)

    def payload(self, zigzag: _Ints) -> bytes:
        found = zigzag[self.places] - 1
        quotients = np.concatenate([self.lengths >> self.low, found >> self.value_low])
        fixed = _pack(self.lengths, self.low) + _pack(found, self.value_low)
        return _COUNT.pack(len(self.places)) + fixed + _unary(quotients)


def _histogram(numbers: _Ints) -> tuple[_Ints, _Ints]:
    """Numbers from 0 on that occur, and how often."""
    counts = np.bincount(numbers)
    values = np.flatnonzero(counts)
    return values, counts[values]


def _best_low(values: _Ints, counts: _Ints, count: int, bits: int) -> tuple[int, int]:
    """Low bits that make the Rice code of ``values`` smallest, and the bits of its unary part then."""
    lows = np.arange(bits)
    unary = count + (values >> lows[:, None]) @ counts
    low = int((unary + count * lows).argmin())
    return low, int(unary[low])


def _from_rice(payload: bytes, counts: tuple[int, ...], lows: tuple[int, ...]) -> list[_Ints]:
    """Lists of numbers: the low bits of each list one after the other, then what is above them of all, in unary."""
    at, rests = 0, list[_Ints]()
    for count, low in zip(counts, lows, strict=True):
        if low > 15:
            raise DamagedSectionError(f"has {low} low bits")
        size = _bytes(count * low)
        if at + size > len(payload):
            raise DamagedSectionError(f"has {len(payload)} bytes for the low bits of {count} numbers")
        rests.append(_unpack(payload[at : at + size], count, low))
        at += size
    quotients = _from_unary(payload[at:], sum(counts))
    parts = np.split(quotients, np.cumsum(counts)[:-1])
    return [(part << low) | rest for part, low, rest in zip(parts, lows, rests, strict=True)]


def _zigzag(codes: Codes) -> _Ints:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    wide = codes.astype(np.int64)
    return (wide << 1) ^ (wide >> 63)


def _from_zigzag(zigzag: _Ints, dtype: np.dtype[Any]) -> Codes:
    if len(zigzag) and zigzag.max() >> 8 * dtype.itemsize:
        raise DamagedSectionError(f"has a weight beyond {dtype}")
    return ((zigzag >> 1) ^ -(zigzag & 1)).astype(dtype)


# -- bits --------------------------------------------------------------------------------------------------------------


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _pack(numbers: NDArray[Any], bits: int) -> bytes:
    """The ``bits`` low bits, at most 16, of each number."""
    width = 1 if bits <= 8 else 2
    raw = numbers.astype(f"<u{width}").view(np.uint8).reshape(-1, width)
    spread = np.unpackbits(raw, axis=1, bitorder="little")[:, :bits]
    return np.packbits(spread, bitorder="little").tobytes()


def _unpack(data: bytes, count: int, bits: int) -> _Ints:
    width = 1 if bits <= 8 else 2
    packed = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    spread = np.zeros((count, 8 * width), np.uint8)
    spread[:, :bits] = packed.reshape(count, bits)
    return np.packbits(spread, bitorder="little").view(f"<u{width}").astype(np.int64)


def _unary(numbers: _Ints) -> bytes:
    """Each number as so many ones and a zero."""
    ends = np.cumsum(numbers + 1)
    bits = np.ones(ends[-1] if len(ends) else 0, np.uint8)
    bits[ends - 1] = 0
    return np.packbits(bits, bitorder="little").tobytes()


def _from_unary(data: bytes, count: int) -> _Ints:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    ends = np.flatnonzero(bits == 0)[:count]
    if len(ends) < count:
        raise DamagedSectionError(f"ends after {len(ends)} of {count} numbers")
    used = int(ends[-1]) + 1 if count else 0
    if len(data) != _bytes(used) or bits[used:].any():
        raise DamagedSectionError(f"goes on after its {count} numbers")
    return np.diff(ends, prepend=-1) - 1
