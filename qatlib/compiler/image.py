"""The encoded weights of an Executable as a file: streams one after the other, and a table of where each lies."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from qatlib.compiler.hardware import Strict
from qatlib.compiler.streams import Order, Stream, WeightDType, addresses, stored
from qatlib.errors import CompileError
from qatlib.program import Program

_MOST_WEIGHTS = 1 << 28
"""Of an op in a file that is read."""


class Record(Strict):
    """Weights of ``op``, its constant ``key``, are ``bytes`` from ``offset`` on."""

    op: str
    key: str
    offset: NonNegativeInt
    bytes: PositiveInt
    dtype: WeightDType
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=2, strict=False)]
    order: Order


@dataclass(frozen=True)
class Image:
    """Streams in the order of the Program; each starts at a multiple of the alignment, zeros fill up."""

    records: tuple[Record, ...]
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def pack_image(program: Program, streams: Mapping[str, Stream], alignment: int) -> Image:
    """The image of ``streams`` by op, weights of ``program``."""
    places, size = addresses(streams, alignment)
    data = bytearray(size)
    for name, stream in streams.items():
        data[places[name] : places[name] + len(stream.data)] = stream.data
    keys = {op.name: op.consts["weight"] for op in program if op.name in streams}
    records = (
        Record(
            op=name, key=keys[name], offset=places[name], bytes=len(one.data), dtype=one.dtype, shape=one.shape,
            order=one.order,
        )
        for name, one in streams.items()
    )  # fmt: skip
    return Image(tuple(records), bytes(data))


def read_image(path: Path, records: Sequence[Record], sha256: str) -> tuple[dict[str, Stream], dict[str, Tensor]]:
    """Streams by op, and weights by key of the constant; CompileError (QAT251) for a file that is not as written.

    Without ``records`` there is no file.
    """

    def broken(seen: str) -> CompileError:
        return CompileError("QAT251", str(path), seen, "Compile the Program again")

    streams, weights = dict[str, Stream](), dict[str, Tensor]()
    if not records:
        return streams, weights
    try:
        data = path.read_bytes()
    except OSError as error:
        raise broken(f"cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise broken("does not have the checksum that executable.json names: truncated or edited")
    for one in records:
        if math.prod(one.shape) > _MOST_WEIGHTS:
            raise broken(f"would hold {math.prod(one.shape)} weights of {one.op!r}")
        part = data[one.offset : one.offset + one.bytes]
        streams[one.op], weights[one.key] = stored(part, one.order, one.dtype, one.shape, one.op)
    return streams, weights
