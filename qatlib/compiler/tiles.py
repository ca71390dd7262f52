"""The boxes in which the core computes each op, and the rows in which maps pass from op to op.

A box is a block of outputs as the estimate assumes it (:mod:`.blocks`), made smaller where the bytes of its inputs and
sums, in their dtypes, would not fit the core's buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from qatlib.compiler.hardware import fill
from qatlib.compiler.job import Job
from qatlib.compiler.legalize import Violation
from qatlib.compiler.target import Target
from qatlib.compiler.tasks import Task
from qatlib.ops.base import BY_KIND
from qatlib.ops.region import Box, Part, Regions, whole
from qatlib.ops.work import Size
from qatlib.program import Op, Program

ROWS = 2
"""Rows of a map that are made at once where maps pass row by row."""
_SUM_BYTES = 4


@dataclass(frozen=True)
class Tiling:
    """How one step is cut: ``block`` rows, columns and channels of outputs; None: it runs whole."""

    op: Op
    regions: Regions | None
    block: Size
    sizes: tuple[int, ...]

    @cached_property
    def parts(self) -> tuple[tuple[Box, Part], ...]:
        """Boxes that cover the output, in order, with what each needs; of an op that is not cut none."""
        if self.regions is None:
            return ()
        return tuple((box, self.regions.part(box)) for box in self.regions.boxes(self.sizes, self.block))

    def strip(self, start: int, stop: int) -> list[tuple[Box, Part]]:
        """The same for rows [start, stop) of ``[N, C, H, W]``."""
        assert self.regions is not None
        row = (*self.sizes[:2], 1, self.sizes[3])
        boxes = [(*box[:2], (start, stop), box[3]) for box in self.regions.boxes(row, self.block)]
        return [(box, self.regions.part(box)) for box in boxes]


def tile(job: Job, at: int) -> Tiling | None:
    """The tiling of step ``at``; None for the host's steps, constants and views."""
    op, passes, program = job.steps[at].op, job.passes[at], job.program
    if not passes:
        return None
    regions, sizes = BY_KIND[op.kind].regions(op, program), program.values[op.output].sizes()
    block = passes[0].cut.ofm
    if regions is None:
        return Tiling(op, None, block, sizes)
    while not _fits(passes[0], program, regions, _largest(regions, sizes, block), job.target):
        smaller = _halved(block, job.target.buffers.block_channels)
        if smaller == block:
            break
        block = smaller
    return Tiling(op, regions, block, sizes)


def strip_block(job: Job, at: int, tiling: Tiling) -> Size:
    """The block of step ``at``, cut as ``tiling``, where it makes :data:`ROWS` rows: as wide as there is room."""
    regions, (_, columns, channels) = tiling.regions, tiling.block
    if regions is None:
        return tiling.block
    columns = min(-(-tiling.sizes[3] // regions.phases[1]), job.target.buffers.max_block[1])
    while columns > 1:
        box = _largest(regions, tiling.sizes, (ROWS, columns, channels))
        if _fits(job.passes[at][0], job.program, regions, box, job.target):
            break
        columns = -(-columns // 2)
    return ROWS, columns, channels


def check_blocks(job: Job) -> tuple[Violation, ...]:
    """The ops whose sums are too large for the core's buffers in every block, with what they need (QAT186)."""
    refused = []
    for at, passes in enumerate(job.passes):
        found = tile(job, at)
        if found is None or found.regions is None or passes[0].work.form != "sums":
            continue
        box = _largest(found.regions, found.sizes, found.block)
        if not _fits(passes[0], job.program, found.regions, box, job.target):
            inputs, sums = _held(passes[0], job.program, found.regions, box, job.target.mac_array.max_kernel)
            has = job.target.buffers
            room = f"{has.shared_bytes}" if has.shared_bytes else f"{has.input_bytes} and {has.accumulator_bytes}"
            seen = f"its smallest block needs buffers of {2 * inputs} bytes for inputs and {2 * sums} for sums"
            fix = f"{job.target.name} has {room}: use a smaller kernel or dilation, or a target with larger buffers"
            refused.append(Violation("QAT186", found.op.name, seen, fix))
    return tuple(refused)


def _halved(block: Size, granule: int) -> Size:
    """The block with half its rows, or columns, or channels in whole granules, the first that can be halved."""
    rows, columns, channels = block
    if rows > 1:
        return -(-rows // 2), columns, channels
    if columns > 1:
        return rows, -(-columns // 2), channels
    return rows, columns, min(channels, fill(-(-channels // 2), granule))


def _largest(regions: Regions, sizes: Sequence[int], block: Size) -> Box:
    """A box of a block that is not at the border, if there is one: borders need less."""
    box = list(whole(sizes))
    for axis, spans in regions.cuts(sizes, block).items():
        box[axis] = spans[len(spans) // 2] if len(spans) > 2 else spans[0]
    return tuple(box)


def _held(task: Task, program: Program, regions: Regions, box: Box, max_kernel: int | None) -> tuple[int, int]:
    """Bytes of inputs and of int32 sums that the core holds for a box.

    Sums are formed in passes over the input's channels, and over pieces of a kernel larger than ``max_kernel``, so that
    only those of a pass are held, and one operand at a time.
    """
    work, taken = task.work, []
    sums = work.form == "sums"
    for at, (value, need) in enumerate(zip(program.in_values(task.op), regions.part(box).needs, strict=True)):
        if need is None:
            continue
        spans = [(max(0, a), min(b, n)) for (a, b), n in zip(need.box, value.sizes(), strict=True)]
        elements = math.prod(max(0, b - a) for a, b in spans)
        if sums and at in (0, work.factor) and not work.own_channel:
            elements = -(-elements * min(work.ifm[2], task.cut.ifm[2]) // work.ifm[2])
        if sums and at == 0 and max_kernel is not None:
            lengths = [stop - start for start, stop in box[2:]] or [1]
            for kernel, stride, apart, n in zip(
                work.kernel, work.stride, work.dilation, (math.prod(lengths[:-1]), lengths[-1]), strict=True
            ):
                beyond = max(0, kernel - max_kernel) * apart  # rows or columns that only another piece reads
                elements -= elements * beyond // ((n - 1) * stride + (kernel - 1) * apart + 1)
        taken.append(elements * value.qtype.bytes)
    held = max(taken, default=0) if sums else sum(taken)
    return held, math.prod(stop - start for start, stop in box) * _SUM_BYTES * (task.engine == "array")


def _fits(task: Task, program: Program, regions: Regions, box: Box, target: Target) -> bool:
    inputs, sums = (2 * held for held in _held(task, program, regions, box, target.mac_array.max_kernel))
    buffers = target.buffers
    if buffers.shared_bytes is not None:
        return inputs + sums <= buffers.shared_bytes
    assert buffers.input_bytes is not None
    assert buffers.accumulator_bytes is not None
    return inputs <= buffers.input_bytes and sums <= buffers.accumulator_bytes
