"""How a compiled Program runs: steps one by one, slices of weights that are staged, steps that run row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qatlib.compiler.hardware import fill
from qatlib.compiler.job import Job
from qatlib.compiler.machine import Rolling
from qatlib.compiler.memory import MemoryPlan
from qatlib.compiler.placement import rolling_bytes
from qatlib.compiler.streams import Stream
from qatlib.compiler.tiles import Tiling, strip_block, tile
from qatlib.ops.region import Box, Part
from qatlib.program import Op, Program


@dataclass(frozen=True)
class Slice:
    """Output channels ``start`` to ``stop`` of an op, whose weights are copied to ``offset`` of the SRAM first.

    They are loaded before step ``before``; later slices when those before them are done. ``axis`` is that of channels.
    They come as they are stored: encoded if there is a ``stream``.
    """

    op: Op
    offset: int
    start: int
    stop: int
    axis: int
    before: int
    parts: tuple[tuple[Box, Part], ...]
    stream: Stream | None = None

    def weight(self, program: Program) -> Tensor:
        """Weights of the slice as integers."""
        return program.constant(self.op, "weight")[self.start : self.stop]

    def span(self, program: Program, start: int, stop: int) -> tuple[int, int]:
        """Bytes of the slice that hold channels [start, stop), and what has to be decoded with them."""
        if self.stream is None:
            size = program.constant(self.op, "weight")[0].nbytes
            return (start - self.start) * size, (stop - self.start) * size
        low, high = self.stream.span(start, stop)
        first, _ = self.stream.span(self.start, self.start)
        return low - first, high - first

    def stored(self, program: Program) -> Tensor:
        """Bytes of the slice."""
        if self.stream is None:
            return self.weight(program).contiguous().view(torch.uint8).view(-1)
        low, high = self.stream.span(self.start, self.stop)
        return torch.frombuffer(bytearray(self.stream.data[low:high]), dtype=torch.uint8)


@dataclass(frozen=True)
class Chain:
    """Steps ``first`` to ``last``, each of which reads the rows of the one before."""

    first: int
    last: int
    tilings: tuple[Tiling, ...]


@dataclass(frozen=True)
class Layout:
    """What a run needs to know beside the places of the values.

    Args:
        tilings: of every step; None for the host's, constants and views.
        chains: by their first step.
        rolling: where the rows of the values within chains lie.
        slices: of the steps that compute from staged weights.
        shown: views, and the values whose bytes they show.
    """

    tilings: tuple[Tiling | None, ...]
    chains: Mapping[int, Chain]
    rolling: Mapping[str, Rolling]
    slices: Mapping[int, tuple[Slice, ...]]
    shown: Mapping[str, str]

    @property
    def chained(self) -> set[int]:
        """Steps that run in chains."""
        return {at for chain in self.chains.values() for at in range(chain.first, chain.last + 1)}


def layout(job: Job, plan: MemoryPlan, streams: Mapping[str, Stream]) -> Layout:
    """How ``job`` runs with ``plan``, from weights encoded in ``streams``; steps that run row by row read them off
    chip.
    """
    tilings = tuple(_tiling(job, plan, at) for at in range(len(job.steps)))
    chains, rolling = _chains(job, plan, tilings)
    found = Layout(tilings, chains, rolling, {}, _shown(job, plan))
    chained = found.chained
    cut = ((at, tiling) for at, tiling in enumerate(tilings) if tiling is not None and at not in chained)
    slices = {at: _slices(job, plan, at, tiling, streams) for at, tiling in cut}
    return replace(found, slices={at: pieces for at, pieces in slices.items() if pieces})


def _tiling(job: Job, plan: MemoryPlan, at: int) -> Tiling | None:
    """The tiling of a step; whole, if it is written over an input of which not each element lies where its own does."""
    found, op = tile(job, at), job.steps[at].op
    if found is None or op.output not in plan.places:
        return found
    others = [x for i, x in enumerate(op.inputs) if i not in job.passes[at][0].work.overlays and x in plan.places]
    return replace(found, regions=None) if any(plan.shares_bytes(x, op.output) for x in others) else found


def _shown(job: Job, plan: MemoryPlan) -> dict[str, str]:
    shown: dict[str, str] = {}
    for step, passes in zip(job.steps, job.passes, strict=True):
        if step.unit == "host" or passes or not step.op.inputs:
            continue
        name, source = step.op.output, step.op.inputs[0]
        if {source, name} <= plan.places.keys() and plan.shares_bytes(source, name):
            shown[name] = shown.get(source, source)
    return shown


# -- weights -----------------------------------------------------------------------------------------------------------


def _slices(job: Job, plan: MemoryPlan, at: int, tiling: Tiling, streams: Mapping[str, Stream]) -> tuple[Slice, ...]:
    """What step ``at`` computes from each slice of its staged weights; none where it reads them off chip.

    Slices alternate between the places of the plan, each as many channels as fit: whole granules, of encoded weights
    whole sections, of a convolution in groups of several channels whole groups.
    """
    op, regions = tiling.op, tiling.regions
    places = sorted((s for s in plan.scratch if s.use == "weights" and s.op == op.name), key=lambda s: s.first)
    if not places or regions is None or not regions.axes.channels:
        return ()
    weight, (axis,), stream = job.program.constant(op, "weight"), regions.axes.channels, streams.get(op.name)
    least, granule = 1, job.target.buffers.block_channels
    if 1 < regions.group < len(weight):
        least = granule = regions.group
    else:
        regions = replace(regions, group=0)
    if stream is not None:
        room = [(s, 0) for s in places if s.size >= stream.largest]
    else:
        room = [(s, s.size // weight[0].nbytes) for s in places if s.size // weight[0].nbytes >= least]
        room = [(s, count - count % granule if count > granule else count) for s, count in room]
    found: list[Slice] = []
    start = 0
    while start < len(weight) and room:
        place, channels = room[len(found) % len(room)]
        stop = min(len(weight), start + channels) if stream is None else stream.fitting(start, place.size)
        sizes = (*tiling.sizes[:axis], stop - start, *tiling.sizes[axis + 1 :])
        boxes = [
            (*box[:axis], (box[axis][0] + start, box[axis][1] + start), *box[axis + 1 :])
            for box in regions.boxes(sizes, tiling.block)
        ]
        parts = tuple((box, regions.part(box)) for box in boxes)
        found.append(Slice(op, place.offset, start, stop, axis, place.first if not found else at, parts, stream))
        start = stop
    return tuple(found)


# -- rows --------------------------------------------------------------------------------------------------------------


def _chains(
    job: Job, plan: MemoryPlan, tilings: Sequence[Tiling | None]
) -> tuple[dict[int, Chain], dict[str, Rolling]]:
    """Steps that run row by row, and where the rows in between lie: one after the other in the plan's scratch."""
    number = {step.op.name: at for at, step in enumerate(job.steps)}
    found: dict[int, Chain] = {}
    rolling: dict[str, Rolling] = {}
    for scratch in plan.scratch:
        if scratch.use != "rows":
            continue
        first, offset = number[scratch.op], scratch.offset
        for at in range(first, scratch.last):
            name, (task,) = job.steps[at].op.output, job.passes[at + 1]
            size, stored = rolling_bytes(task, job), job.maps[name]
            rows, columns, channels = stored.size
            depth = fill(channels, job.target.brick_channels) if stored.brick else channels
            row_bytes = columns * depth * stored.element_bytes
            rolling[name] = Rolling(offset, min(rows, size // row_bytes), row_bytes)
            offset += size
        cut = ((at, tilings[at]) for at in range(first, scratch.last + 1))
        strips = tuple(replace(one, block=strip_block(job, at, one)) for at, one in cut if one is not None)
        found[first] = Chain(first, scratch.last, strips)
    return found, rolling
