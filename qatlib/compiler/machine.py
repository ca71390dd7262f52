"""The memories of a compiled Program as real bytes, and who owns each byte.

An op of the compiled Program reads its inputs from here and writes its output here, in the width of its dtype. Memory
starts poisoned and unowned; writing a value makes its buffer the owner of the bytes. A plan in which two live buffers
overlap, or an order in which a value is read before it is written, is caught at the first byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatlib.compiler.memory import Arena, MemoryPlan, Place
from qatlib.errors import CompileError
from qatlib.program import Program

POISON = 0x81
_NOBODY = -1
TORCH_DTYPE = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}


class Machine:
    """Arenas of the sizes that the plan reaches, poisoned.

    For ``batch`` samples at once every size and offset of the plan is multiplied by ``batch``: buffers that share bytes
    in the plan share them here, and only those. A value without a batch axis fills the first part of its place.
    """

    def __init__(self, program: Program, plan: MemoryPlan, batch: int = 1) -> None:
        self._values, self._plan, self._batch = program.values, plan, batch
        self._buffers = sorted({place.buffer for place in plan.places.values()})
        self._number = {name: i for i, name in enumerate(self._buffers)}
        peaks: dict[Arena, int] = {
            "sram": plan.sram.peak_bytes, "dram": plan.dram.peak_bytes, "rows": plan.rows.peak_bytes,
        }  # fmt: skip
        sizes = {arena: peak * batch for arena, peak in peaks.items()}
        self._bytes = {arena: torch.full((size,), POISON, dtype=torch.uint8) for arena, size in sizes.items()}
        self._owner = {arena: torch.full((size,), _NOBODY, dtype=torch.int32) for arena, size in sizes.items()}

    def write(self, name: str, codes: Tensor) -> None:
        """Store integers of value ``name``."""
        place, window = self._window(name)
        raw = codes.contiguous().view(-1).view(torch.uint8)
        if raw.numel() != window.stop - window.start:
            raise self._broken(name, f"has {raw.numel()} bytes, its place {window.stop - window.start}")
        self._bytes[place.arena][window] = raw
        self._owner[place.arena][window] = self._number[place.buffer]

    def read(self, name: str) -> Tensor:
        """Integers of value ``name`` with its shape; CompileError (QAT189) if other bytes lie there."""
        place, window = self._window(name)
        owner = self._owner[place.arena][window]
        foreign = (owner != self._number[place.buffer]).nonzero()
        if len(foreign):
            at = int(foreign[0])
            other = int(owner[at])
            seen = "nothing was written" if other == _NOBODY else f"the bytes belong to {self._buffers[other]!r}"
            raise self._broken(name, f"is read from {place.arena} byte {window.start + at}, where {seen}")
        value = self._values[name]
        codes = self._bytes[place.arena][window].clone().view(TORCH_DTYPE[value.qtype.dtype])
        return codes.view(value.sizes(self._batch))

    def _window(self, name: str) -> tuple[Place, slice]:
        place = self._plan.places.get(name)
        if place is None:
            raise self._broken(name, "has no place in the memory plan")
        start = place.offset * self._batch
        end = start + self._values[name].bytes(self._batch)
        size = len(self._bytes[place.arena])
        if end > size:
            raise self._broken(name, f"ends at byte {end} of {place.arena}, which has {size}")
        return place, slice(start, end)

    @staticmethod
    def _broken(name: str, seen: str) -> CompileError:
        return CompileError("QAT189", name, seen, "The memory plan does not fit its Program; compile it again")
