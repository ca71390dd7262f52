"""Stored weights, decoded in plain Python as ``docs/weights.md`` describes them; loops, no arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

WIDTH = {"int8": 1, "int16": 2}


class Bits:
    """A run of bits that starts in byte ``at``."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._next = data, 8 * at

    def take(self) -> int:
        bit = self._data[self._next // 8] >> self._next % 8 & 1
        self._next += 1
        return bit

    def number(self, bits: int) -> int:
        return sum(self.take() << i for i in range(bits))

    def unary(self) -> int:
        count = 0
        while self.take():
            count += 1
        return count

    @property
    def end(self) -> int:
        """The byte after the last that was begun."""
        return -(-self._next // 8)


def section(data: bytes, count: int, dtype: str) -> list[int]:
    """The ``count`` weights of a section."""
    form, parameters, size = data[0], data[1], int.from_bytes(data[2:6], "little")
    payload, width = data[6:], WIDTH[dtype]
    assert len(payload) == size
    if form == 0:
        return _plain(payload, count, width)
    if form == 1:
        length = payload[0] + 1
        values = _plain(payload[1:], length, width)
        bits = 0
        while 2**bits < length:
            bits += 1
        indices = Bits(payload, 1 + length * width)
        return [values[indices.number(bits)] for _ in range(count)]
    if form == 2:
        return [_weight(number) for (number,) in zip(*_rice(payload, 0, [(count, parameters)]), strict=True)]
    assert form == 3
    some = int.from_bytes(payload[:4], "little")
    zeros, numbers = _rice(payload, 4, [(some, parameters // 16), (some, parameters % 16)])
    found: list[int] = []
    for before, number in zip(zeros, numbers, strict=True):
        found += [0] * before + [_weight(number + 1)]
    return found + [0] * (count - len(found))


def stream(
    data: bytes, shape: tuple[int, int, int], order: Mapping[str, int], dtype: str
) -> dict[tuple[int, ...], int]:
    """Weights by (output, input, tap) of all sections of an op."""
    outputs, inputs, taps = shape
    found: dict[tuple[int, ...], int] = {}
    for start in range(0, outputs, order["section"]):
        stop = min(outputs, start + order["section"])
        size = 6 + int.from_bytes(data[2:6], "little")
        weights = section(data[:size], (stop - start) * inputs * taps, dtype)
        places = list(in_order(start, stop, inputs, taps, order))
        assert len(places) == len(weights)
        found |= dict(zip(places, weights, strict=True))
        data = data[size:]
    assert not data
    return found


def in_order(start: int, stop: int, inputs: int, taps: int, order: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
    """(output, input, tap) of a section's weights, as they lie in it."""
    for group in _pieces(start, stop, order["group"]):
        for together in _pieces(0, inputs, order["pass_inputs"]):
            for tile in _pieces(*group, order["tile"]):
                for some_taps in _pieces(0, taps, order["taps"]):
                    for some_inputs in _pieces(*together, order["inputs"]):
                        for output in range(*tile):
                            for tap in range(*some_taps):
                                for one in range(*some_inputs):
                                    yield output, one, tap


def _pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(stop, at + size)) for at in range(start, stop, size)]


def _plain(data: bytes, count: int, width: int) -> list[int]:
    return [int.from_bytes(data[width * i : width * i + width], "little", signed=True) for i in range(count)]


def _rice(payload: bytes, at: int, lists: list[tuple[int, int]]) -> list[list[int]]:
    low_bits = []
    for count, low in lists:
        bits = Bits(payload, at)
        low_bits.append([bits.number(low) for _ in range(count)])
        at = bits.end
    above = Bits(payload, at)
    return [[(above.unary() << low) + rest for rest in rests] for rests, (_, low) in zip(low_bits, lists, strict=True)]


def _weight(zigzag: int) -> int:
    return zigzag // 2 if zigzag % 2 == 0 else -(zigzag + 1) // 2
