"""From which step to which each value lives, and which values share bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate

from qatlib.compiler.job import Job


@dataclass(frozen=True)
class Buffer:
    """Bytes that one or several values share from step ``start`` to step ``end``, both included.

    -1 is before the first step and the number of steps is after the last. ``size`` is a multiple of the alignment.
    ``inside`` are the places of the values in it, in bytes; without, all start with it.
    """

    name: str
    values: tuple[str, ...]
    start: int
    end: int
    size: int
    inside: tuple[int, ...] = ()

    def meets(self, other: Buffer) -> bool:
        """True if both are alive at some step."""
        return self.start <= other.end and other.start <= self.end

    def offsets(self) -> dict[str, int]:
        """Place of each value."""
        return dict(zip(self.values, self.inside or (0,) * len(self.values), strict=True))


def lifetimes(
    job: Job, kept: Collection[str] | None = None, apart: Collection[str] = (), rows: Collection[str] = ()
) -> tuple[Buffer, ...]:
    """Buffers in the order in which they are complete. Views share the bytes of what they show.

    With ``kept``, the values that the SRAM holds, what is computed in the place of an operand shares its bytes as well
    if both are in the same memory, and what is nothing but its operands side by side those of all of them. Values in
    ``apart`` are not made of their operands. Those in ``rows`` pass row by row and share with nobody; the ops between
    which they pass run together, so that what the first reads and what the last writes live at once.
    """
    made, needed = job.life
    start, end = _together(job, rows) if rows else (made, needed)
    root: dict[str, str] = {}
    groups: dict[str, dict[str, int]] = {}
    for name, at in made.items():
        if name not in job.maps:
            continue
        source = job.shown[at] if at >= 0 and job.shown[at] in root else None
        if source is None and at >= 0 and kept is not None and name not in rows:
            over, others = job.overlaid[at]
            taken = {*rows, *(root[x] for x in others if x in root)}
            free = (x for x in over if x in root and root[x] not in taken and (x in kept) == (name in kept))
            source = next((x for x in free if _ends(job, groups[root[x]]) == at), None)
        if source is not None:
            root[name] = root[source]
            groups[root[name]][name] = groups[root[source]][source]
            continue
        groups[name] = {name: 0}
        alone = name in apart or name in rows or (at >= 0 and any(x in rows for x in job.steps[at].op.inputs))
        if kept is not None and at >= 0 and not alone and _joins(job, at, root, groups, kept):
            operands = job.steps[at].op.inputs
            ends = accumulate(job.maps[x].stored_bytes for x in operands)
            for operand, stop in zip(operands, ends, strict=True):
                place = stop - job.maps[operand].stored_bytes
                groups[name] |= {v: place + inside for v, inside in groups.pop(root[operand]).items()}
        root |= dict.fromkeys(groups[name], name)
    return tuple(
        Buffer(
            name=name,
            values=tuple(values),
            start=min(start[v] for v in values),
            end=max(end[v] for v in values),
            size=max(job.maps[v].stored_bytes for v in values),
            inside=tuple(values.values()) if any(values.values()) else (),
        )
        for name, values in groups.items()
    )


def _together(job: Job, rows: Collection[str]) -> tuple[dict[str, int], dict[str, int]]:
    """:attr:`.job.Job.life` where ops between which ``rows`` pass run together."""
    made, needed = job.life
    first, last = [*range(len(job.steps))], [*range(len(job.steps))]
    for at, step in enumerate(job.steps):
        if step.op.output in rows:
            first[at + 1] = first[at]
            last[first[at] : at + 1] = [at + 1] * (at + 1 - first[at])
    start = {name: first[at] if at >= 0 else at for name, at in made.items()}
    return start, {name: last[at] if 0 <= at < len(last) else at for name, at in needed.items()}


def joined(job: Job, buffers: Collection[Buffer]) -> frozenset[str]:
    """Names of the ops that have nothing to do, as their operands are made in the place of their output."""
    home = {value: buffer for buffer in buffers for value in buffer.values}
    found = set()
    for at in job.joining:
        op = job.steps[at].op
        if all(x in home and home[x] is home.get(op.output) for x in op.inputs):
            found.add(op.name)
    return frozenset(found)


def _ends(job: Job, group: Collection[str]) -> int:
    return max(job.life[1][name] for name in group)


def _joins(
    job: Job, at: int, root: Mapping[str, str], groups: Mapping[str, Mapping[str, int]], kept: Collection[str]
) -> bool:
    """Whether the operands of step ``at`` can be made in the place of its output: nothing needs them later, or more
    room than they have there.
    """
    op = job.steps[at].op
    names = [root.get(x) for x in op.inputs]
    if at not in job.joining or None in names or len(set(names)) < len(names):
        return False
    for x in op.inputs:
        group = groups[root[x]]
        size = max(job.maps[v].stored_bytes for v in group)
        if (x in kept) != (op.output in kept) or _ends(job, group) != at or not job.boundary.isdisjoint(group):
            return False
        if size != job.maps[x].stored_bytes:
            return False
    return True
