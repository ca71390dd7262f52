"""The memories of a compiled Program as real bytes, and who owns each byte.

An op of the compiled Program reads boxes of its inputs from here and writes boxes of its output here, in the width of
the dtype. Memory starts poisoned and unowned; writing makes the value the owner of the bytes. A plan in which two live
buffers overlap, rows that are gone when they are read, an element that no box covered, or an order in which a value is
read before it is written, is caught at the first byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatlib.compiler.memory import MemoryPlan
from qatlib.errors import CompileError
from qatlib.ops.region import Box
from qatlib.program import Program

POISON = 0x81
_NOBODY = -1
TORCH_DTYPE = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
Memory = Literal["sram", "dram"]
_Array = NDArray[np.integer]


@dataclass(frozen=True)
class Rolling:
    """A map ``[N, C, H, W]`` of which the SRAM holds ``rows`` rows from ``offset`` on, row y in the place y % rows.

    ``row_bytes`` is the distance of two rows.
    """

    offset: int
    rows: int
    row_bytes: int


def weights_of(op: str) -> str:
    """Owner of the staged weights of an op."""
    return f"weights of {op}"


class Machine:
    """SRAM and DRAM of the sizes that the plan reaches, poisoned.

    For ``batch`` samples at once every size and offset of the plan is multiplied by ``batch``: values that share bytes
    in the plan share them here, and only those. A value without a batch axis fills the first part of its place.
    ``rolling`` are the values that pass row by row, ``shown`` the values in whose bytes others are views. What
    a join is made of is its own from the start.
    """

    def __init__(
        self,
        program: Program,
        plan: MemoryPlan,
        batch: int = 1,
        rolling: Mapping[str, Rolling] | None = None,
        shown: Mapping[str, str] | None = None,
    ) -> None:
        self._values, self._plan, self._batch = program.values, plan, batch
        self._rolling, self._shown = rolling or {}, dict(shown or {})
        for op in program.ops:
            if op.name in plan.joined:
                self._shown |= dict.fromkeys(op.inputs, op.output)
        self._names: list[tuple[str, int]] = []  # who an owner is, and for rolling rows which row
        self._first: dict[str, int] = {}
        for name in plan.places:
            self._first[name] = len(self._names)
            rows = self._values[name].shape[2] if name in self._rolling else 1
            self._names += [(name, row) for row in range(rows)]
        for staged in sorted(plan.staged):
            self._first[weights_of(staged)] = len(self._names)
            self._names.append((weights_of(staged), 0))
        peaks: dict[Memory, int] = {"sram": plan.sram.peak_bytes, "dram": plan.dram.peak_bytes}
        self._bytes = {m: torch.full((peak * batch,), POISON, dtype=torch.uint8) for m, peak in peaks.items()}
        self._number = torch.int16 if len(self._names) < 1 << 15 else torch.int32
        self._owner = {m: torch.full((peak * batch,), _NOBODY, dtype=self._number) for m, peak in peaks.items()}
        self._row_ids = torch.arange(len(self._names), dtype=self._number).view(-1, 1, 1).numpy()
        self._views: dict[str, tuple[_Array, _Array]] = {}  # of NumPy, whose views cost a fraction of torch's

    def write(self, name: str, codes: Tensor, box: Box | None = None) -> None:
        """Store ``codes``, integers in any dtype, of ``box`` of value ``name``, or of all of it."""
        at, (data, owner) = self._index(name, box), self._window(name)
        for rows, part in self._pieces(name, at):
            target = data[part]
            piece = codes if rows is None else codes[:, :, slice(*rows)]
            if piece.shape != target.shape:  # which NumPy would broadcast
                raise self._broken(name, f"gets {list(piece.shape)} elements for {list(target.shape)}")
            target[...] = piece.numpy()
            owner[part] = self._ids(name, at, rows)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Integers of ``box`` of value ``name``, or all; CompileError (QAT189) if other bytes lie there.

        What comes back may be a view: it is to be copied before anything is written.
        """
        at, (data, owner) = self._index(name, box), self._window(name)
        found = []
        for rows, part in self._pieces(name, at):
            foreign = owner[part] != self._ids(name, at, rows)
            if np.count_nonzero(foreign):
                raise self._stranger(name, at, rows, owner[part], foreign)
            found.append(data[part])
        return torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found, 2))

    def stage(self, op: str, offset: int, weights: Tensor) -> None:
        """Store bytes of an op's weights from ``offset`` of the plan on; all samples share them."""
        raw, owner = self._slot(op, offset, len(weights))
        raw.copy_(weights)
        owner.fill_(self._first[weights_of(op)])

    def staged(self, op: str, offset: int, skip: int, weights: Tensor) -> bytes:
        """The bytes ``weights`` of an op, ``skip`` behind ``offset``; CompileError (QAT189) if others lie there."""
        raw, owner = (found[skip:] for found in self._slot(op, offset, skip + len(weights)))
        foreign = owner != self._first[weights_of(op)]
        if bool(foreign.any()):
            number = int(owner[foreign][0])
            seen = "nothing was written" if number == _NOBODY else f"the bytes belong to {self._names[number][0]!r}"
            raise self._broken(op, f"reads staged weights, where {seen}")
        if not torch.equal(raw, weights):
            raise self._broken(op, "reads staged weights, where others of its own lie")
        return raw.numpy().tobytes()

    def _slot(self, op: str, offset: int, size: int) -> tuple[Tensor, Tensor]:
        start = offset * self._batch
        if start + size > len(self._bytes["sram"]):
            raise self._broken(op, f"has staged weights up to byte {start + size} of sram, which has less")
        return self._bytes["sram"][start : start + size], self._owner["sram"][start : start + size]

    # -- where a value lies ----------------------------------------------------------------------------------------

    def _index(self, name: str, box: Box | None) -> tuple[slice, ...]:
        value = self._values[name]
        if box is None:
            return (slice(None),) * len(value.shape)
        return tuple(slice(None) if size < 0 else slice(*span) for size, span in zip(value.shape, box, strict=True))

    def _pieces(self, name: str, at: tuple[slice, ...]) -> list[tuple[tuple[int, int] | None, tuple[slice, ...]]]:
        """Places of ``at``: of rolling rows one or two stretches, each with the rows of ``at`` that it holds.

        A box that reads nothing but padding has no rows, in one stretch.
        """
        rolling = self._rolling.get(name)
        if rolling is None:
            return [(None, at)]
        start, stop, _ = at[2].indices(self._values[name].shape[2])
        if stop - start > rolling.rows:
            raise self._broken(
                name, f"is asked for {stop - start} rows at once, of which the SRAM holds {rolling.rows}"
            )
        found: list[tuple[tuple[int, int] | None, tuple[slice, ...]]] = []
        row = start
        while row < stop or not found:
            slot = row % rolling.rows
            count = min(stop - row, rolling.rows - slot)
            found.append(((row - start, row - start + count), (*at[:2], slice(slot, slot + count), *at[3:])))
            row += count
        return found

    def _ids(self, name: str, at: tuple[slice, ...], rows: tuple[int, int] | None) -> int | _Array:
        """Owners of a piece: one, or one per row, to be compared with bytes ``[N, C, rows, W, bytes]``."""
        while name in self._shown:
            name = self._shown[name]
        first = self._first[name]
        if rows is None:
            return first
        start = at[2].indices(self._values[name].shape[2])[0]
        return self._row_ids[first + start + rows[0] : first + start + rows[1]]

    def _window(self, name: str) -> tuple[_Array, _Array]:
        """Elements of value ``name`` with its shape, and the owners of their bytes along one more axis."""
        if name not in self._views:
            data, owner = self._placed(name)
            self._views[name] = data.numpy(), owner.numpy()
        return self._views[name]

    def _placed(self, name: str) -> tuple[Tensor, Tensor]:
        place, value, batch = self._plan.places.get(name), self._values[name], self._batch
        if place is None:
            raise self._broken(name, "has no place in the memory plan")
        rolling, width = self._rolling.get(name), value.qtype.bytes
        memory: Memory = "dram" if place.arena == "dram" else "sram"
        if rolling is not None:
            start, size = rolling.offset * batch, rolling.rows * rolling.row_bytes * batch
        else:
            start, size = place.offset * batch, value.bytes(batch)
        if start + size > len(self._bytes[memory]):
            raise self._broken(name, f"ends at byte {start + size} of {memory}, which has {len(self._bytes[memory])}")
        data = self._bytes[memory][start : start + size].view(TORCH_DTYPE[value.qtype.dtype])
        owner = self._owner[memory][start : start + size].view(-1, width)
        if rolling is None:
            sizes = value.sizes(batch)
            return data.view(sizes), owner.view(*sizes, width)
        _, channels, _, columns = value.shape
        data = data.view(batch, rolling.rows, -1)[..., : channels * columns]
        owner = owner.view(batch, rolling.rows, -1, width)[..., : channels * columns, :]
        sizes = (batch, rolling.rows, channels, columns)
        return data.view(sizes).transpose(1, 2), owner.view(*sizes, width).transpose(1, 2)

    # -- what went wrong -------------------------------------------------------------------------------------------

    def _stranger(
        self, name: str, at: tuple[slice, ...], rows: tuple[int, int] | None, owner: _Array, foreign: NDArray[np.bool_]
    ) -> CompileError:
        *place, byte = (int(i) for i in np.argwhere(foreign)[0])
        number = int(owner[(*place, byte)])
        element = [(span.start or 0) + i for span, i in zip(at, place, strict=True)]
        if rows is not None:
            element[2] += rows[0]
        if number == _NOBODY:
            seen = "nothing was written"
        else:
            other, row = self._names[number]
            seen = f"the bytes belong to {other!r}" + (f", row {row}" if other in self._rolling else "")
        return self._broken(name, f"is read at element {element}, where {seen}")

    @staticmethod
    def _broken(name: str, seen: str) -> CompileError:
        return CompileError("QAT189", name, seen, "The memory plan does not fit its Program; compile it again")
