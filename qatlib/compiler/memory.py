"""Where each value lives: lifetimes, what stays in the SRAM, and a best-fit packing of both arenas. Batch 1.

What a ``constant`` op writes stays among the weights and takes part in none of this. Values that share bytes (a reshape
and what it reads, an element-wise result and the operand in whose place it is written) form one buffer. Which buffers
the SRAM holds, with the weights that are staged there and the rows that pass through it, :mod:`.placement` chooses.
Buffers of an arena are placed largest first, each in the smallest gap that holds it and is free during its whole life;
ties go to the earlier, then to the name, so equal Programs get equal plans. What then finds no gap goes to DRAM.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from qatlib.compiler.cycles import Timing
from qatlib.compiler.job import Job, describe
from qatlib.compiler.lays import lays
from qatlib.compiler.lifetimes import Buffer, joined, lifetimes
from qatlib.compiler.placement import GREEDY, Placement, Policy, place, time_all
from qatlib.compiler.spread import Spread
from qatlib.compiler.steps import Step
from qatlib.compiler.streams import addresses, encoded_only
from qatlib.compiler.target import Target
from qatlib.program import Program

Arena = Literal["sram", "dram", "rows"]
"""``rows``: passes row by row through the SRAM; its place says where it would lie if it were held whole."""
Count = Annotated[int, Field(ge=0)]


_Held = tuple[int, Literal["weights", "rows"], Buffer]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Frozen):
    """Bytes of one value: ``buffer`` names the group that shares them; ``size`` is what the value may take of it from
    ``offset`` on, ``bytes`` what it takes.
    """

    buffer: str
    arena: Arena
    offset: Count
    size: Count
    bytes: Count


class Scratch(_Frozen):
    """Bytes of the SRAM that hold no whole value, from step ``first`` to step ``last``.

    ``weights`` are those that op ``op`` reads more than once, ``rows`` what passes through the ops from it on.
    """

    op: str
    use: Literal["weights", "rows"]
    offset: Count
    size: Count
    first: Annotated[int, Field(ge=-1)]
    last: Count


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

    ``rows`` is the use of what passes row by row, if it were held whole. ``joined`` are the ops whose inputs are made
    in the place of their output, so that they have nothing to do. ``weight_bytes`` are the accelerator's
    constants, each counted once in the width of its dtype or as encoded; they stay in DRAM.
    """

    places: Mapping[str, Place]
    scratch: tuple[Scratch, ...] = ()
    sram: ArenaUse
    dram: ArenaUse
    rows: ArenaUse
    unlimited: ArenaUse
    joined: tuple[str, ...] = ()
    weight_bytes: Count

    @property
    def spilled(self) -> tuple[str, ...]:
        """Names of the values that live in DRAM, sorted."""
        return tuple(name for name, place in sorted(self.places.items()) if place.arena == "dram")

    def shares_bytes(self, a: str, b: str) -> bool:
        return self.places[a].buffer == self.places[b].buffer

    @property
    def staged(self) -> frozenset[str]:
        """Names of the ops whose weights are staged in the SRAM."""
        return frozenset(scratch.op for scratch in self.scratch if scratch.use == "weights")

    @property
    def off_chip(self) -> frozenset[str]:
        """Names of the values that ops read and write in DRAM."""
        return frozenset(self.spilled)


def plan_memory(program: Program, steps: Sequence[Step], target: Target) -> MemoryPlan:
    """Place every integer value; float values at the boundary are the host's and have no place."""
    return plan(describe(program, steps, target))


@dataclass(frozen=True)
class Draft:
    """Which memory holds what, all of which has room: for most targets all of a plan that decides what it costs.

    ``held`` are buffers of the SRAM that hold no whole value, with the step that they belong to; of rows, with what
    passes. ``kept`` are the values that the SRAM holds whole.
    """

    job: Job
    policy: Policy
    held: tuple[_Held, ...]
    kept: frozenset[str]
    buffers: tuple[Buffer, ...]

    @cached_property
    def rows(self) -> frozenset[str]:
        return frozenset(name for _, use, one in self.held if use == "rows" for name in one.values)

    @cached_property
    def staged(self) -> frozenset[str]:
        return frozenset(self.job.steps[at].op.name for at, use, _ in self.held if use == "weights")

    @cached_property
    def off_chip(self) -> frozenset[str]:
        inside = self.kept | self.rows
        return frozenset(name for buffer in self.buffers if buffer.name not in inside for name in buffer.values)

    @cached_property
    def joined(self) -> frozenset[str]:
        return joined(self.job, self.buffers)

    @cached_property
    def plan(self) -> MemoryPlan:
        """With a place for everything."""
        return _finish(self)

    @property
    def places(self) -> Mapping[str, Place]:
        return self.plan.places

    @property
    def scratch(self) -> tuple[Scratch, ...]:
        return self.plan.scratch


def plan(job: Job, policy: Policy = GREEDY) -> MemoryPlan:
    """See :func:`plan_memory`; ``policy`` says what the SRAM may be used for."""
    return draft(job, policy).plan


def draft(job: Job, policy: Policy = GREEDY) -> Draft:
    """What the SRAM holds under ``policy``."""
    placement = place(job, lifetimes(job), policy)
    return _fitted(job, placement, _scratch(job, placement), policy)


def _finish(found: Draft) -> MemoryPlan:
    job, held, kept, rows, buffers = found.job, found.held, found.kept, found.rows, found.buffers
    inside: dict[Arena, list[Buffer]] = {"sram": [], "dram": [], "rows": []}
    for buffer in buffers:
        name = buffer.name
        inside["rows" if name in rows else "sram" if name in kept else "dram"].append(buffer)
    scratch = [one for _, _, one in held]
    offsets: dict[Arena, dict[str, int]] = {arena: pack(members, None)[0] for arena, members in inside.items()}
    sram = offsets["sram"] = _packed(job, [*inside["sram"], *scratch], found.policy)
    places = {
        name: Place(
            buffer=buffer.name, arena=arena, offset=offsets[arena][buffer.name] + at, size=buffer.size - at,
            bytes=job.program.values[name].bytes(),
        )
        for arena, members in inside.items() for buffer in members for name, at in buffer.offsets().items()
    }  # fmt: skip
    plain = {key for step in job.steps if step.unit == "npu" for key in step.op.consts.values()}
    plain -= encoded_only(job.program, job.streams)
    whole = lifetimes(job, job.maps)
    return MemoryPlan(
        places=places,
        scratch=tuple(
            Scratch(
                op=job.steps[at].op.name, use=use, offset=sram[one.name], size=one.size, first=one.start, last=one.end
            )
            for at, use, one in held
        ),
        sram=_use([*inside["sram"], *scratch], sram),
        dram=_use(inside["dram"], offsets["dram"]),
        rows=_use(inside["rows"], offsets["rows"]),
        unlimited=_use(whole, pack(whole, None)[0]),
        joined=tuple(sorted(found.joined)),
        weight_bytes=sum(job.program.constants[key].nbytes for key in plain)
        + addresses(job.streams, job.target.sram.alignment)[1],
    )


def _packed(job: Job, buffers: Sequence[Buffer], policy: Policy) -> dict[str, int]:
    """Offsets in the SRAM, which are known to exist; in banks of their own only if all fit that way too."""
    size = job.target.sram.bytes
    if policy.spread and job.target.sram.bank_bytes:
        found, left = pack(buffers, size, Spread(job, buffers))
        if not left:
            return found
    return pack(buffers, size)[0]


def time_plan(job: Job, memory: MemoryPlan | Draft) -> list[tuple[Timing, ...]]:
    """Timings of the passes of every step that has something to do, where ``memory`` has the maps."""
    staged, off = memory.staged, memory.off_chip | job.constants
    staging = {at for at, step in enumerate(job.steps) if step.op.name in staged}
    return time_all(job, off, staging, memory.joined, lays(job, memory))


def _scratch(job: Job, placement: Placement) -> list[_Held]:
    """See :attr:`Draft.held`."""
    found: list[_Held] = []
    for at, (first, later) in placement.staged.items():
        name = f"weights of {job.steps[at].op.name}"
        found.append((at, "weights", Buffer(f"{name}, first", (), at - 1, at, first)))
        if later:
            found.append((at, "weights", Buffer(f"{name}, next", (), at, at, later)))
    for one in placement.cascades:
        name = f"rows from {job.steps[one.start].op.name}"
        found.append((one.start, "rows", Buffer(name, one.values, one.start, one.end, one.rows)))
    return found


def _fitted(job: Job, placement: Placement, scratch: list[_Held], policy: Policy) -> Draft:
    """What of the placement can be packed. Cheap maps give way first, then weights, then rows."""
    kept, held = list(placement.kept), scratch
    apart = frozenset() if policy.joins else job.joins
    while True:
        values = frozenset(name for buffer in kept for name in buffer.values)
        rows = {name for _, use, one in held if use == "rows" for name in one.values}
        buffers = lifetimes(job, values, apart, rows)
        inside = [buffer for buffer in buffers if buffer.name in values]
        _, left = pack([*inside, *(one for _, _, one in held)], job.target.sram.bytes)
        if not left:
            return Draft(job, policy, tuple(held), values, buffers)
        homeless = {name for buffer in left if buffer in inside for name in buffer.values}
        victim = next((b for b in reversed(kept) if b.name in homeless), None)
        victim = victim or next((b for b in reversed(kept) if any(b.meets(other) for other in left)), None)
        if victim is not None:
            kept.remove(victim)
            continue
        at, use = min(((at, use) for at, use, one in held if one in left), key=lambda one: one[1] == "rows")
        held = [one for one in held if one[:2] != (at, use)]


def misfit(plan: MemoryPlan, program: Program, steps: Sequence[Step], target: Target) -> str:
    """Why ``plan`` cannot be one of ``program`` on ``target``, by names and sizes; "" if it can."""
    fixed = constants(program)
    integers = {name: v for name, v in program.values.items() if not v.qtype.is_float and name not in fixed}
    if set(plan.places) != set(integers):
        return "places other values than its Program has"
    alignment = target.sram.alignment
    for name, at in plan.places.items():
        wrong = at.bytes != integers[name].bytes() or at.size < at.bytes
        if wrong or at.offset % alignment or at.size % alignment:
            return f"gives {name!r} {at.bytes} bytes at offset {at.offset}"
    outputs = [step.op.output for step in steps]
    number = {step.op.name: at for at, step in enumerate(steps)}

    def fits(one: Scratch) -> bool:
        if one.op not in number or one.last >= len(steps) or not one.size or one.size % alignment:
            return False
        through = [plan.places.get(name) for name in outputs[number[one.op] : one.last]]
        return one.use == "weights" or (through != [] and all(at is not None and at.arena == "rows" for at in through))

    strange = next((one for one in plan.scratch if not fits(one)), None)
    if strange is not None:
        return f"has {strange.use} of {strange.op!r} in {strange.size} bytes, which is no op or no such place"
    homes = {name: at.buffer for name, at in plan.places.items()}
    together = {s.op.name for s in steps if len({homes.get(x, x) for x in (s.op.output, *s.op.inputs)}) == 1}
    if not together >= set(plan.joined):
        return f"says that {sorted(set(plan.joined) - together)[0]!r} has nothing to do, but not why"
    for arena, use in (("sram", plan.sram), ("dram", plan.dram), ("rows", plan.rows)):
        ends = [p.offset + p.size for p in plan.places.values() if p.arena == arena]
        ends += [s.offset + s.size for s in plan.scratch if arena == "sram"]
        if max(ends, default=0) != use.peak_bytes:
            return f"states a {arena} peak of {use.peak_bytes} bytes that its places do not have"
    return f"needs more than {target.sram.bytes} bytes of SRAM" if plan.sram.peak_bytes > target.sram.bytes else ""


def constants(program: Program) -> set[str]:
    """Values that are read where the weights are: the outputs of ``constant`` ops."""
    return {op.output for op in program.ops if op.kind == "constant"}


def pack(
    buffers: Iterable[Buffer], capacity: int | None, spread: Spread | None = None
) -> tuple[dict[str, int], tuple[Buffer, ...]]:
    """Offsets of the buffers that fit below ``capacity`` bytes (None: no limit), and the buffers that do not."""
    placed: list[tuple[int, int, int, int]] = []  # offset, end of the bytes, first and last step: in this order
    lying: list[tuple[int, Buffer]] = []
    offsets: dict[str, int] = {}
    left: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.start, b.name)):
        start, end = buffer.start, buffer.end
        taken = [(low, high) for low, high, first, last in placed if first <= end and start <= last]
        if spread:
            offset = spread.offset(buffer, lying, taken)
        else:
            offset = _best_gap(taken, buffer.size, capacity)
        if offset is None:
            left.append(buffer)
        else:
            insort(placed, (offset, offset + buffer.size, start, end))
            offsets[buffer.name] = offset
            lying.append((offset, buffer))
    return offsets, tuple(left)


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
