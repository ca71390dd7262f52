"""From which step to which each value lives, and which values share bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qatlib.compiler.job import Job


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


def lifetimes(job: Job, kept: Collection[str] | None = None) -> tuple[Buffer, ...]:
    """Buffers in the order in which they come alive. Views share the bytes of what they show.

    With ``kept``, the values that the SRAM holds, what is computed in the place of an operand shares its bytes as well
    if both are in the same memory.
    """
    program, steps = job.program, job.steps
    start = dict.fromkeys(program.inputs, -1) | {step.op.output: i for i, step in enumerate(steps)}
    end = dict(start)
    for i, step in enumerate(steps):
        end |= dict.fromkeys(step.op.inputs, i)
    end |= dict.fromkeys(program.outputs, len(steps))
    root: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in start:
        if name not in job.maps:
            continue
        source = _shown(job, start[name], root) if start[name] >= 0 else None
        if source is None and start[name] >= 0 and kept is not None:
            over, others = _operands(job, start[name])
            taken = {root[x] for x in others if x in root}
            free = (x for x in over if x in root and root[x] not in taken and (x in kept) == (name in kept))
            source = next((x for x in free if max(end[v] for v in groups[root[x]]) == start[name]), None)
        root[name] = name if source is None else root[source]
        groups.setdefault(root[name], []).append(name)
    return tuple(
        Buffer(
            name=name,
            values=tuple(values),
            start=min(start[v] for v in values),
            end=max(end[v] for v in values),
            size=max(job.maps[v].stored_bytes for v in values),
        )
        for name, values in groups.items()
    )


def _shown(job: Job, at: int, root: Mapping[str, str]) -> str | None:
    """What step ``at`` shows in another shape, None if it is no view."""
    step = job.steps[at]
    view = step.unit == "npu" and not job.passes[at]
    return step.op.inputs[0] if view and step.op.inputs and step.op.inputs[0] in root else None


def _operands(job: Job, at: int) -> tuple[list[str], set[str]]:
    """Inputs of step ``at`` in whose place its output can be computed if nothing needs them later, and its others."""
    op, passes = job.steps[at].op, job.passes[at]
    if len(passes) != 1 or op.output in job.boundary:
        return [], set()
    mine, overlays = job.maps[op.output], passes[0].work.overlays
    theirs = {x: job.maps[x] for x in (op.inputs[i] for i in overlays) if x in job.maps and x not in job.boundary}
    fit = [x for x, m in theirs.items() if m.size == mine.size and m.element_bytes >= mine.element_bytes]
    return fit, {x for i, x in enumerate(op.inputs) if i not in overlays}
