"""What the SRAM holds: weights that are staged, rows that pass from op to op, and the maps that move the most bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qatlib.compiler.banks import Lay
from qatlib.compiler.cycles import Timing
from qatlib.compiler.hardware import fill
from qatlib.compiler.job import Job
from qatlib.compiler.lifetimes import Buffer, lifetimes
from qatlib.compiler.tasks import Task
from qatlib.ops.base import BY_KIND
from qatlib.ops.region import whole

_Bytes = NDArray[np.int64]


@dataclass(frozen=True)
class Cascade:
    """Ops whose maps in between (``values``) pass row by row through ``rows`` bytes, from ``start`` to ``end``."""

    values: tuple[str, ...]
    start: int
    end: int
    rows: int


@dataclass(frozen=True)
class Policy:
    """What the SRAM may be used for, and what its use should save: ``cycles`` or ``bytes`` of the DRAM.

    With ``spread``, what a step uses lies in different banks where they are free.

    A search overrules single choices by name: weights of ops that are not ``unstaged``, maps that pass row by row
    (``streamed``) or do not (``whole``), that leave the SRAM (``evicted``) or come before all others (``favoured``).
    """

    maps: bool = True
    staging: bool = True
    cascades: bool = True
    joins: bool = True
    spread: bool = False
    saves: Literal["cycles", "bytes"] = "cycles"
    unstaged: frozenset[str] = frozenset()
    streamed: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    evicted: frozenset[str] = frozenset()
    favoured: frozenset[str] = frozenset()


GREEDY = Policy()


@dataclass(frozen=True)
class Placement:
    """``kept`` are the buffers of the SRAM, the dearest first; ``staged`` two slices of weights by step."""

    kept: tuple[Buffer, ...]
    cascades: tuple[Cascade, ...]
    staged: dict[int, tuple[int, int]]


def time_all(
    job: Job,
    off: Collection[str],
    staging: Collection[int],
    idle: Collection[str] = (),
    lays: Sequence[Lay | None] | None = None,
) -> list[tuple[Timing, ...]]:
    """Timings of every step's passes; in the steps of ``staging``, weights that are read more than once are staged.

    The ops in ``idle`` have nothing to do. ``lays`` are the places of each step's streams, if there is a plan.
    """
    found: list[tuple[Timing, ...]] = []
    slack = 0.0
    for i, passes in enumerate(job.passes):
        row = []
        for task in passes if job.steps[i].op.name not in idle else ():
            row.append(job.timer.time(task, job.target, off, i in staging, slack, lays[i] if lays else None))
            slack = row[-1].slack
        found.append(tuple(row))
    return found


def place(job: Job, buffers: Sequence[Buffer], policy: Policy = GREEDY) -> Placement:
    """A greedy choice, as if buffers that live at once always fit together; the packing has the last word.

    Staged weights come first. Where input and output of an op do not fit together, its input comes row by row from the
    op that makes it: a cascade. Of the other maps those stay that would cost the most off chip, of equal ones
    those that take the SRAM for the least bytes and steps. Inputs that are in the SRAM from the start come before all
    else, those that are off chip stay there.
    """
    limit, count = job.target.sram.bytes, len(job.steps)
    staged = _staged(job, policy) if policy.staging else {}
    used = np.zeros(count + 2, np.int64)  # from before the first step to after the last
    for at, (first, later) in staged.items():
        used[at : at + 2] += first
        used[at + 1] += later
    cascades = _cascades(job, buffers, used, policy) if policy.cascades else []
    inside = {name for cascade in cascades for name in cascade.values}
    buffers = lifetimes(job, rows=inside) if inside else buffers
    apart = frozenset() if policy.joins else job.joins
    pinned = job.entering if job.options.input_source == "sram" else frozenset()

    def rank(buffer: Buffer) -> tuple[bool, bool, int, int, int, str]:
        area, values = buffer.size * (buffer.end - buffer.start + 1), {*buffer.values}
        saved = sum(job.losses.get(v, (0, 0))[policy.saves == "bytes"] for v in buffer.values)
        late = not pinned & values, not policy.favoured & values
        return *late, -saved, area, buffer.start, buffer.name

    outside = (frozenset() if job.target.sram.holds_boundary else job.boundary) | policy.evicted
    outside |= job.entering if job.options.input_source == "ddr" else frozenset()
    wanted = [b for b in sorted(buffers, key=rank) if b.name not in inside and not outside & {*b.values}]
    if not policy.maps:
        wanted = [buffer for buffer in wanted if pinned & {*buffer.values}]
    if (used + live_bytes(job, frozenset(v for b in wanted for v in b.values), apart, inside)).max() <= limit:
        return Placement(tuple(wanted), tuple(cascades), staged)
    kept: list[Buffer] = []
    values: frozenset[str] = frozenset()
    most = used.copy()  # if nothing shared bytes
    grows = bool(job.joins - apart)  # operands that share bytes with what they become live as long as it
    for buffer in wanted:
        more = values | {*buffer.values}
        life = slice(buffer.start + 1, buffer.end + 2)  # elsewhere the weights alone may be too many
        if (not grows and (most[life] + buffer.size).max() <= limit) or (
            (used + live_bytes(job, more, apart, inside))[life].max() <= limit
        ):
            kept.append(buffer)
            values = more
            most[life] += buffer.size
    return Placement(tuple(kept), tuple(cascades), staged)


def live_bytes(job: Job, kept: frozenset[str], apart: Collection[str] = (), rows: Collection[str] = ()) -> _Bytes:
    """Bytes of the values in ``kept`` that live at once, from before the first step to after the last.

    Those in ``rows`` pass row by row.
    """
    live = np.zeros(len(job.steps) + 2, np.int64)
    for buffer in lifetimes(job, kept, apart, rows):
        if buffer.name in kept:
            live[buffer.start + 1 : buffer.end + 2] += buffer.size
    return live


def _staged(job: Job, policy: Policy) -> dict[int, tuple[int, int]]:
    """Bytes of the first and of a later slice of the weights that each step stages, if all maps were in the SRAM."""
    found = {}
    allowed = [at for at, step in enumerate(job.steps) if step.op.name not in policy.unstaged]
    for at, row in enumerate(time_all(job, job.constants, allowed)):
        first = fill(sum(timing.first_slice for timing in row), job.target.sram.alignment)
        later = fill(sum(timing.next_slice for timing in row), job.target.sram.alignment)
        if 0 < first + later <= job.target.sram.bytes:
            found[at] = first, later
    return found


def _cascades(job: Job, buffers: Sequence[Buffer], used: _Bytes, policy: Policy) -> list[Cascade]:
    """Chains in program order; their rows are added to ``used``."""
    limit, alone = job.target.sram.bytes, {b.name: b for b in buffers if len(b.values) == 1}
    readers: Counter[str] = Counter(name for step in job.steps for name in step.op.inputs)
    found, at = [], 0
    while at < len(job.steps):
        end, rows, values = at, 0, list[str]()
        while end + 1 < len(job.steps):
            name, task = job.steps[end].op.output, streams(job.passes[end + 1])
            if task is None or not job.passes[end] or name in job.boundary or name not in alone or readers[name] != 1:
                break
            together = job.maps[name].stored_bytes + task.target.stored_bytes
            if name in policy.whole or (together < limit and name not in policy.streamed):
                break
            if job.steps[end + 1].op.inputs != (name,) or not all(_by_rows(job, at) for at in (end, end + 1)):
                break
            more = rows + rolling_bytes(task, job)
            if more + used[at + 1 : end + 3].max() > limit:
                break
            end, rows = end + 1, more
            values.append(name)
        if values:
            life = slice(at + 1, end + 2)
            used[life] += rows
            found.append(Cascade(tuple(values), at, end, rows))
        at = end + 1
    return found


def streams(passes: Sequence[Task]) -> Task | None:
    """The task of a step that can read its input row by row."""
    if len(passes) == 1 and passes[0].work.form in ("sums", "windows") and passes[0].work.factor is None:
        return passes[0]
    return None


def _by_rows(job: Job, at: int) -> bool:
    """Whether step ``at`` writes ``[N, C, H, W]`` and can do so row by row."""
    op = job.steps[at].op
    shape = job.program.values[op.output].shape
    regions = BY_KIND[op.kind].regions(op, job.program) if len(shape) == 4 and shape[0] == -1 else None
    return regions is not None and 2 in regions.axes.rows


def rolling_bytes(task: Task, job: Job) -> int:
    """Rows of its input that a task needs for two of its own, and those that are written meanwhile."""
    assert task.source is not None
    rows, columns, channels = task.source.size
    stride, reach = task.work.stride[0], (task.work.kernel[0] - 1) * task.work.dilation[0] + 1
    needed = max(stride + reach, _rows_for_two(task, job))
    depth = fill(channels, job.target.brick_channels) if task.source.brick else channels
    size = min(rows, needed + 2 * stride) * columns * depth * task.source.element_bytes
    return fill(size, job.target.sram.alignment)


def _rows_for_two(task: Task, job: Job) -> int:
    """Rows of its input that two rows in the middle of the output need; two of each phase, if it has phases."""
    regions = BY_KIND[task.op.kind].regions(task.op, job.program)
    assert regions is not None
    sizes = job.program.values[task.op.output].sizes()
    step = 2 * regions.phases[0]
    start = sizes[2] // 2 // step * step
    (need, *_) = regions.part((*whole(sizes[:2]), (start, min(sizes[2], start + step)), (0, sizes[3]))).needs
    assert need is not None
    low, high = need.box[2]
    return high - low
