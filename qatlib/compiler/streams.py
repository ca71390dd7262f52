"""Weights of an op as they are stored: in the order in which the array reads them, in sections decoded on their own."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

from qatlib.compiler.codec import DamagedSectionError, decode, encode, split
from qatlib.compiler.hardware import Strict, fill
from qatlib.errors import CompileError
from qatlib.program import Program

WeightDType = Literal["int8", "int16"]


class Order(Strict):
    """How the array takes weights ``[outputs, inputs, taps]``.

    Sections hold ``section`` outputs, the last one what is left. In a section groups of ``group`` outputs, of which
    each meets inputs of its own, come one after the other; in a group passes of ``pass_inputs`` inputs, in a pass tiles
    of ``tile`` outputs, in a tile steps of ``taps``, in them steps of ``inputs``. A step has, output by output, its
    inputs side by side, tap by tap.
    """

    section: PositiveInt
    group: PositiveInt
    tile: PositiveInt
    pass_inputs: PositiveInt
    inputs: PositiveInt
    taps: PositiveInt

    def places(self, outputs: int, inputs: int, taps: int) -> NDArray[np.int64]:
        """Where each weight of a section lies in ``[outputs, inputs, taps]``, in the order of the stream."""
        group = min(self.group, outputs)
        if group * inputs * taps * (outputs // group) == 0:
            return np.zeros(0, np.int64)
        place: NDArray[np.int64] = np.arange(outputs * inputs * taps)
        place = place.reshape(-1, group, inputs, taps)
        place = _cut(place, 3, self.taps)
        place = _cut(_cut(place, 2, self.pass_inputs), 3, self.inputs)
        place = _cut(place, 1, self.tile)  # groups, tiles, outputs, passes, steps, inputs, steps, taps
        place = place.transpose(0, 3, 1, 6, 4, 2, 7, 5).ravel()
        return place[place >= 0]


def _cut(place: NDArray[np.int64], axis: int, size: int) -> NDArray[np.int64]:
    """``axis`` as pieces of ``size`` (at most all of it) and what is in them; the last filled up with -1."""
    length = place.shape[axis]
    size = min(size, length)
    missing = [(0, 0)] * place.ndim
    missing[axis] = (0, fill(length, size) - length)
    place = np.pad(place, missing, constant_values=-1)
    return place.reshape(*place.shape[:axis], -1, size, *place.shape[axis + 1 :])


@dataclass(frozen=True, eq=False)
class Stream:
    """Encoded weights of ``shape`` ``[outputs, inputs, ...]``; section k is ``data[ends[k] : ends[k + 1]]``."""

    order: Order
    dtype: WeightDType
    shape: tuple[int, ...]
    data: bytes
    ends: tuple[int, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first output of each section, and the number of all."""
        return (*range(0, self.shape[0], self.order.section), self.shape[0])

    @property
    def largest(self) -> int:
        """Bytes of the largest section."""
        return max((stop - start for start, stop in pairwise(self.ends)), default=0)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Bytes of the sections that hold outputs [start, stop)."""
        return self.ends[start // self.order.section], self.ends[-(-stop // self.order.section)]

    def fitting(self, start: int, room: int) -> int:
        """The output before which whole sections from ``start`` on, which begins one, end in ``room`` bytes."""
        first = start // self.order.section
        return self.starts[bisect_right(self.ends, self.ends[first] + room) - 1]

    def decode(self, data: bytes, start: int, stop: int, op: str) -> Tensor:
        """Weights of outputs [start, stop), whole sections, out of their bytes; CompileError (QAT251) naming ``op``."""
        first = start // self.order.section
        inner = self.shape[1], math.prod(self.shape[2:])
        codes = np.empty((stop - start) * math.prod(inner), self.dtype)
        at = 0
        for k, (low, high) in enumerate(pairwise(self.starts[first:]), first):
            if low >= stop:
                break
            section = data[self.ends[k] - self.ends[first] : self.ends[k + 1] - self.ends[first]]
            count = (high - low) * math.prod(inner)
            try:
                codes[at + _places(self.order, high - low, *inner)] = decode(section, count, codes.dtype)
            except DamagedSectionError as error:
                raise damaged(op, f"section {k} {error}") from None
            at += count
        return torch.from_numpy(codes).view(stop - start, *self.shape[1:])


def damaged(op: str, seen: str) -> CompileError:
    return CompileError("QAT251", op, f"has stored weights that are damaged: {seen}", "Compile the Program again")


_places = lru_cache(maxsize=32)(Order.places)
_known: WeakValueDictionary[tuple[object, ...], Stream] = WeakValueDictionary()
"""Streams that somebody holds, by content: a search describes the same weights again and again."""


def encoded(weight: Tensor, order: Order) -> Stream:
    """The stream of ``weight``, int8 or int16; the same for equal weights and orders as long as it is in use."""
    codes = weight.contiguous().cpu().numpy()
    key = _key(codes, order)
    found = _known.get(key)
    if found is None:
        rows = codes.reshape(len(codes), -1)
        inner = codes.shape[1], math.prod(codes.shape[2:])
        sections, ends = list[bytes](), [0]
        for start in range(0, len(codes), order.section):
            part = rows[start : start + order.section]
            sections.append(encode(part.ravel()[_places(order, len(part), *inner)]))
            ends.append(ends[-1] + len(sections[-1]))
        found = Stream(order, cast(WeightDType, codes.dtype.name), codes.shape, b"".join(sections), tuple(ends))
        _known[key] = found
    return found


def stored(data: bytes, order: Order, dtype: WeightDType, shape: Sequence[int], op: str) -> tuple[Stream, Tensor]:
    """A stream out of its bytes, and its weights; CompileError (QAT251) naming ``op`` for bytes that are none."""
    try:
        ends = split(data, -(-shape[0] // order.section))
    except DamagedSectionError as error:
        raise damaged(op, f"a section {error}") from None
    stream = Stream(order, dtype, tuple(shape), data, tuple(ends))
    if any((stop - start) % min(order.group, stop - start) for start, stop in pairwise(stream.starts)):
        raise damaged(
            op, f"sections of {order.section} outputs, the last of what is left, hold no groups of {order.group}"
        )
    weight = stream.decode(data, 0, shape[0], op)
    return _known.setdefault(_key(weight.numpy(), order), stream), weight


def decoded(program: Program, streams: Mapping[str, Stream]) -> Program:
    """``program`` with the weights that are stored in ``streams``."""
    weights = {
        op.consts["weight"]: streams[op.name].decode(streams[op.name].data, 0, streams[op.name].shape[0], op.name)
        for op in program
        if op.name in streams
    }
    return replace(program, constants={**program.constants, **weights}) if weights else program


def _key(codes: NDArray[Any], order: Order) -> tuple[object, ...]:
    return hashlib.blake2b(codes.tobytes()).digest(), codes.dtype.name, codes.shape, order


def encoded_only(program: Program, streams: Collection[str]) -> set[str]:
    """Constants that nothing but the ops of ``streams`` reads, as their weights."""
    weights = {op.consts["weight"] for op in program if op.name in streams}
    others = ((op.name in streams and role == "weight", key) for op in program for role, key in op.consts.items())
    return weights - {key for packed, key in others if not packed}


def addresses(streams: Mapping[str, Stream], alignment: int) -> tuple[dict[str, int], int]:
    """Where the stream of each op lies, one after the other, and where the last ends; equal ones are stored once."""
    at, found, places = 0, dict[str, int](), dict[int, int]()
    for op, stream in streams.items():
        if id(stream) not in places:
            places[id(stream)] = at
            at += fill(len(stream.data), alignment)
        found[op] = places[id(stream)]
    return found, at
