"""Where in the SRAM a plan has what each step reads and writes, as its banks see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qatlib.compiler.banks import WEIGHTS, Lay, Stretch
from qatlib.compiler.job import Job
from qatlib.compiler.tasks import Map

if TYPE_CHECKING:
    from qatlib.compiler.memory import Draft, MemoryPlan


def lays(job: Job, plan: MemoryPlan | Draft) -> tuple[Lay | None, ...]:
    """Streams of every step; None for all of them where banks have no addresses of their own."""
    if job.target.sram.bank_bytes is None:
        return (None,) * len(job.steps)
    return tuple(tuple(_streams(job, plan, at)) for at in range(len(job.steps)))


def _streams(job: Job, plan: MemoryPlan | Draft, at: int) -> Iterator[tuple[str, tuple[Stretch, ...]]]:
    for task in job.passes[at]:
        factors = task.beside if task.work.factor is not None else ()
        for one in (*task.inputs, task.target):
            spans = tuple(_spans(job, plan, one, one not in factors))
            if spans:
                yield one.name, spans
    name = job.steps[at].op.name
    weights = tuple(Stretch(s.offset, s.size, False) for s in plan.scratch if s.use == "weights" and s.op == name)
    if weights:
        yield WEIGHTS, weights


def _spans(job: Job, plan: MemoryPlan | Draft, one: Map, swept: bool) -> Iterator[Stretch]:
    """Of a map; of one that passes row by row its rows."""
    place = plan.places.get(one.name)
    if place is not None and place.arena == "sram":
        size = min(one.stored_bytes, place.size)  # less only in a file that was edited
        yield Stretch(place.offset, size, swept)
    if place is not None and place.arena == "rows":
        made = job.life[0][one.name]
        yield from (
            Stretch(s.offset, s.size, False) for s in plan.scratch if s.use == "rows" and s.first <= made < s.last
        )
