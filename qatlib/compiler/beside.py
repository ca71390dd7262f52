"""Which neighbouring steps run at once: one of the table unit and one of the vector unit that share no bytes.

Bytes, not names, decide: what the plan wrote over, a view of a value and the operands of a joined ``cat`` show there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qatlib.compiler.cycles import Timing
from qatlib.compiler.job import Job
from qatlib.compiler.memory import Draft, MemoryPlan

_Bytes = tuple[str, int, int]
"""Arena, first byte, and the one after the last."""


def pairs(job: Job, plan: MemoryPlan | Draft, timings: Sequence[Sequence[Timing]]) -> dict[int, int]:
    """The step with which each step runs at once, by the earlier of both; steps without timings are passed over."""
    found: dict[int, int] = {}
    last: int | None = None
    for at in (at for at, row in enumerate(timings) if row):
        if last is not None and job.beside(last, at) and _apart(job, plan, last, at):
            found[last], last = at, None
        else:
            last = at
    return found


def _apart(job: Job, plan: MemoryPlan | Draft, a: int, b: int) -> bool:
    """Whether neither writes a byte that the other reads or writes, and no map of theirs passes row by row."""
    reads, writes = ([_bytes(job, plan, names) for names in kind] for kind in _values(job, a, b))
    both = [*reads, *writes]
    if any(arena == "rows" for places in both for arena, _, _ in places):
        return False
    return not any(_meet(writes[i], places) for i in (0, 1) for places in (reads[1 - i], writes[1 - i]))


def _values(job: Job, *steps: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    ops = [job.steps[at].op for at in steps]
    return [op.inputs for op in ops], [(op.output,) for op in ops]


def _bytes(job: Job, plan: MemoryPlan | Draft, names: Iterable[str]) -> list[_Bytes]:
    """Where values lie; constants are only read."""
    found = []
    for name in names:
        if name in plan.places:
            place = plan.places[name]
            found.append((str(place.arena), place.offset, place.offset + job.maps[name].stored_bytes))
    return found


def _meet(some: Iterable[_Bytes], others: Sequence[_Bytes]) -> bool:
    return any(a == b and low < end and start < high for a, low, high in some for b, start, end in others)
