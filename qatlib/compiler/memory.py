"""Where each value lives: lifetimes, a best-fit packing of SRAM, and what is spilled to DRAM. Batch 1.

What a ``constant`` op writes stays among the weights and takes part in none of this. Values that share bytes (a reshape
and what it reads) form one buffer. Buffers are placed largest first, each in the smallest gap that holds it and is free
during its whole life; a buffer for which SRAM has no such gap goes to DRAM, where the same rule applies without a
limit. Largest first keeps the spilled bytes, and with them the DRAM traffic, low; ties go to the earlier, then to the
name, so equal Programs get equal plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from qatlib.compiler.steps import Step
from qatlib.compiler.target import Target
from qatlib.program import Program

Arena = Literal["sram", "dram"]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Buffer:
    """Bytes that one or several values share from step ``start`` to step ``end``, both included.

    -1 is before the first step and the number of steps is after the last. ``size`` is a multiple of the alignment.
    """

    name: str
    values: tuple[str, ...]
    start: int
    end: int
    size: int

    def meets(self, other: Buffer) -> bool:
        """True if both are alive at some step."""
        return self.start <= other.end and other.start <= self.end


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Frozen):
    """Bytes of one value: ``buffer`` names the group that shares them, ``bytes`` is the exact size."""

    buffer: str
    arena: Arena
    offset: Count
    bytes: Count


class ArenaUse(_Frozen):
    """How full an arena gets: ``peak_bytes`` as packed; ``live_bytes`` alive at once, which no packing can beat."""

    peak_bytes: Count
    live_bytes: Count

    @property
    def fragmentation(self) -> float:
        """Share of the peak that a perfect packing might have saved, 0 to 1."""
        return 1 - self.live_bytes / self.peak_bytes if self.peak_bytes else 0.0


class MemoryPlan(_Frozen):
    """Places of all integer values but the constants. ``unlimited`` is the use of an SRAM that holds everything.

    ``weight_bytes`` are the accelerator's constants, each counted once in the width of its dtype; they stay in DRAM
    and are streamed once per inference.
    """

    places: Mapping[str, Place]
    sram: ArenaUse
    dram: ArenaUse
    unlimited: ArenaUse
    weight_bytes: Count

    @property
    def spilled(self) -> tuple[str, ...]:
        """Names of the values that live in DRAM, sorted."""
        return tuple(name for name, place in sorted(self.places.items()) if place.arena == "dram")

    def shares_bytes(self, a: str, b: str) -> bool:
        return self.places[a].buffer == self.places[b].buffer


def plan_memory(program: Program, steps: Sequence[Step], target: Target) -> MemoryPlan:
    """Place every integer value; float values at the boundary are the host's and have no place."""
    buffers = lifetimes(program, steps, target.sram.alignment)
    sram, spilled = pack(buffers, target.sram.bytes)
    dram, _ = pack(spilled, None)
    unlimited, _ = pack(buffers, None)
    places: dict[str, Place] = {}
    for buffer in buffers:
        arena: Arena = "sram" if buffer.name in sram else "dram"
        offset = (sram if arena == "sram" else dram)[buffer.name]
        for name in buffer.values:
            places[name] = Place(buffer=buffer.name, arena=arena, offset=offset, bytes=program.values[name].bytes())
    used = {key for step in steps if step.unit == "npu" for key in step.op.consts.values()}
    return MemoryPlan(
        places=places,
        sram=_use(buffers, sram),
        dram=_use(buffers, dram),
        unlimited=_use(buffers, unlimited),
        weight_bytes=sum(program.constants[key].nbytes for key in used),
    )


def misfit(plan: MemoryPlan, program: Program, target: Target) -> str:
    """Why ``plan`` cannot be one of ``program`` on ``target``, by names and sizes; "" if it can."""
    fixed = constants(program)
    integers = {name: v for name, v in program.values.items() if not v.qtype.is_float and name not in fixed}
    if set(plan.places) != set(integers):
        return "places other values than its Program has"
    for name, place in plan.places.items():
        if place.bytes != integers[name].bytes() or place.offset % target.sram.alignment:
            return f"gives {name!r} {place.bytes} bytes at offset {place.offset}"
    for arena, use in (("sram", plan.sram), ("dram", plan.dram)):
        inside = [place for place in plan.places.values() if place.arena == arena]
        ends = (place.offset + _round_up(place.bytes, target.sram.alignment) for place in inside)
        if max(ends, default=0) != use.peak_bytes:
            return f"states a {arena} peak of {use.peak_bytes} bytes that its places do not have"
    return f"needs more than {target.sram.bytes} bytes of SRAM" if plan.sram.peak_bytes > target.sram.bytes else ""


def constants(program: Program) -> set[str]:
    """Values that are read where the weights are: the outputs of ``constant`` ops."""
    return {op.output for op in program.ops if op.kind == "constant"}


def lifetimes(program: Program, steps: Sequence[Step], alignment: int) -> tuple[Buffer, ...]:
    """Buffers in the order in which they come alive; sizes are rounded up to ``alignment``."""
    start = dict.fromkeys(program.inputs, -1) | {step.op.output: i for i, step in enumerate(steps)}
    end = dict(start)
    for i, step in enumerate(steps):
        end |= dict.fromkeys(step.op.inputs, i)
    end |= dict.fromkeys(program.outputs, len(steps))
    source = {step.op.output: step.op.inputs[0] for step in steps if step.op.kind == "reshape"}
    root: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    fixed = constants(program)
    for name in start:
        if program.values[name].qtype.is_float or name in fixed:
            continue
        root[name] = root.get(source.get(name, name), name)
        groups.setdefault(root[name], []).append(name)
    return tuple(
        Buffer(
            name=name,
            values=tuple(values),
            start=min(start[v] for v in values),
            end=max(end[v] for v in values),
            size=_round_up(max(program.values[v].bytes() for v in values), alignment),
        )
        for name, values in groups.items()
    )


def pack(buffers: Iterable[Buffer], capacity: int | None) -> tuple[dict[str, int], tuple[Buffer, ...]]:
    """Offsets of the buffers that fit below ``capacity`` bytes (None: no limit), and the buffers that do not."""
    placed: list[tuple[int, Buffer]] = []
    left: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.start, b.name)):
        taken = sorted((offset, offset + other.size) for offset, other in placed if other.meets(buffer))
        offset = _best_gap(taken, buffer.size, capacity)
        if offset is None:
            left.append(buffer)
        else:
            placed.append((offset, buffer))
    return {buffer.name: offset for offset, buffer in placed}, tuple(left)


def _best_gap(taken: Sequence[tuple[int, int]], size: int, capacity: int | None) -> int | None:
    """Offset of the smallest gap between ``taken`` intervals that holds ``size``, else of the space above them."""
    best: tuple[int, int] | None = None
    top = 0
    for low, high in taken:
        gap = low - top
        if gap >= size and (best is None or gap < best[0]):
            best = (gap, top)
        top = max(top, high)
    if best is not None:
        return best[1]
    return top if capacity is None or top + size <= capacity else None


def _use(buffers: Sequence[Buffer], offsets: Mapping[str, int]) -> ArenaUse:
    inside = [buffer for buffer in buffers if buffer.name in offsets]
    return ArenaUse(
        peak_bytes=max((offsets[buffer.name] + buffer.size for buffer in inside), default=0),
        live_bytes=max((sum(b.size for b in inside if b.start <= a.start <= b.end) for a in inside), default=0),
    )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
