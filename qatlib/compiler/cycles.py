"""Cycles of a task from its cut and its traffic, and which part of the machine they are due to."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from qatlib.compiler.banks import Lay
from qatlib.compiler.hardware import fill, pieces
from qatlib.compiler.target import Target
from qatlib.compiler.tasks import Task
from qatlib.compiler.traffic import Traffic, bus_cycles, memory_of, move, rate, staging_rate, stream_width
from qatlib.ops.work import Work

Limit = Literal["mac", "vector", "table", "weights", "sram", "dram"]
_GROUP = 16


@dataclass(frozen=True)
class Timing:
    """Estimate for one task, in cycles and bytes.

    ``core`` is how long array and vector unit, or the unit beside them that does the work, need with all that they wait
    for; ``cycles`` the largest of it and the two buses. ``limit`` names what it is due to. ``slack`` is how long the
    last slice of weights runs, under which those of the next task can arrive; ``first_slice`` and ``next_slice`` are
    the SRAM that staged weights take.
    """

    cycles: int
    core: int
    mac: int
    vector: int
    weight_wait: int
    sram: int
    banks: int
    dram: int
    limit: Limit
    slack: int
    sram_bytes: int
    dram_bytes: int
    weight_bytes: int
    first_slice: int
    next_slice: int


def time(
    task: Task,
    target: Target,
    off: Collection[str],
    staging: bool = True,
    slack: float = 0,
    lay: Lay | None = None,
) -> Timing:
    """What ``task`` takes; for ``off``, ``staging``, ``slack`` and ``lay`` see :func:`.traffic.move`."""
    moved = move(task, target, off, staging, slack, lay)
    held = stages(task, target, moved, off)
    waited = slices(task, target, moved, held.core, slack)
    staged = moved.weights + moved.scales if moved.staged else 0
    least = task.stream.largest if task.stream is not None and staged else 0
    bus, dram = bus_cycles(target, target.sram, moved.sram), bus_cycles(target, target.dram, moved.dram)
    sram = max(bus, moved.banks)
    cycles = max(waited.core, sram, dram)
    mac, vector = held.first.busy * held.blocks, held.last.busy * held.blocks
    if task.engine == "vector":
        mac, vector = 0.0, mac
    moving = max(held.first.moving, held.last.moving) * held.blocks + held.tail
    moving += held.lead if held.lead_for != "table" else 0.0
    scales = held.last.busy + held.last.weights if held.last.weights else 0.0
    fed = max(held.first.weights, scales) * held.blocks
    shares: dict[Limit, float] = {
        "mac": mac, "vector": 0.0 if task.unit == "table" else vector,
        "table": vector + held.lead if task.unit == "table" else 0.0, "weights": max(fed, waited.core - held.core),
        "sram": moving if held.memory == "sram" else 0, "dram": moving if held.memory == "dram" else 0,
    }  # fmt: skip
    limit: Limit = max(shares, key=lambda name: shares[name])
    if cycles > waited.core:
        limit = "sram" if sram >= dram else "dram"
    return Timing(
        cycles=_whole(cycles),
        core=_whole(waited.core),
        mac=_whole(mac),
        vector=_whole(vector),
        weight_wait=_whole(waited.core - held.core),
        sram=_whole(sram),
        banks=_whole(sram - bus),
        dram=_whole(dram),
        limit=limit,
        slack=_whole(waited.last),
        sram_bytes=_whole(sum(moved.sram.values())),
        dram_bytes=_whole(sum(moved.dram.values()) + moved.early),
        weight_bytes=moved.weights,
        first_slice=max(_whole(staged * waited.first), least),
        next_slice=max(_whole(staged * waited.later), least) if waited.later else 0,
    )


def _whole(amount: float) -> int:
    """Begun cycles and bytes count; what a division leaves behind the comma does not."""
    return math.ceil(round(amount, 6))


@dataclass(frozen=True)
class Stage:
    """Cycles for which a unit holds a block: ``busy`` at work, the rest with what the block waits for there.

    That are ``weights`` to be decoded or scales, data ``moving``, and blocks at the other unit.
    """

    cycles: float = 0.0
    busy: float = 0.0
    weights: float = 0.0
    moving: float = 0.0


@dataclass(frozen=True)
class Stages:
    """How ``blocks``, not a whole number, pass two units one after the other; work of one unit holds no ``last``.

    ``lead`` and ``tail`` are cycles before the first block and after the last. What is read or written is in
    ``memory``, that of the slower of both. ``lead_for`` is what comes in the lead: data from there or a table.
    """

    blocks: float
    first: Stage
    last: Stage
    lead: float
    tail: float
    memory: Literal["sram", "dram"]
    lead_for: Literal["data", "table"] = "data"

    @property
    def core(self) -> float:
        """Cycles of all blocks, if no bus holds them up: the slower unit all of them, the other the first or last."""
        a, b = self.first.cycles, self.last.cycles
        return max(a, b) * self.blocks + min(a, b) + self.lead + self.tail


def stages(task: Task, target: Target, moved: Traffic, off: Collection[str]) -> Stages:
    """The path of the blocks of ``task``: ``blocks_under_way`` of them share the time of one."""
    read, write, memory = _moving(task, target, moved, off)
    make = _array if task.engine == "array" else _vector
    return make(task, target, moved, read, write, memory)


def _moving(
    task: Task, target: Target, moved: Traffic, off: Collection[str]
) -> tuple[float, float, Literal["sram", "dram"]]:
    """Cycles to read one block and to write one, and which memory the slower of the two is in."""
    read = 0.0
    far = task.target.name in off
    sink = memory_of(target, far)
    out_bytes = math.prod(task.cut.ofm) * task.target.element_bytes
    write = sink.write_latency_cycles + out_bytes * moved.out_burst / stream_width(target, sink)
    if task.source is not None:
        away = task.source.name in off
        source = memory_of(target, away)
        in_bytes = math.prod(task.cut.ifm) * task.source.element_bytes
        read = source.read_latency_cycles + in_bytes * moved.in_burst / stream_width(target, source)
        far = away if read >= write else far
    return read, write, "dram" if far else "sram"


def _array(
    task: Task, target: Target, moved: Traffic, read: float, write: float, memory: Literal["sram", "dram"]
) -> Stages:
    work, cut, buffers = task.work, task.cut, target.buffers
    count = math.prod(map(pieces, work.ofm, cut.tile)) / math.prod(map(pieces, cut.ofm, cut.tile)) * work.times
    mac, plain = (mac_cycles(task, target, decoded) for decoded in (True, False))
    vector = float(math.ceil(math.prod(cut.ofm) / task.rate))
    out = max(vector, _scale_wait(task, target, moved))
    overlap = buffers.reads_while_writing
    between = abs(read - write) * (count > 1) if overlap else read + write
    issue, moving = (between + mac + out) / buffers.blocks_under_way, between / buffers.blocks_under_way
    return Stages(
        count,
        Stage(max(mac, issue), plain, mac - plain, moving),
        Stage(max(out, issue), vector, out - vector, moving),
        read if overlap else 0.0,
        write if overlap else 0.0,
        memory,
    )


def _scale_wait(task: Task, target: Target, moved: Traffic) -> float:
    """Cycles in which the scales of a block come, piece by piece."""
    piece = target.weights.scale_fetch_bytes
    if not moved.scales or piece is None:
        return 0.0
    memory = target.sram if moved.staged and target.buffers.reads_while_writing else target.dram
    return target.weights.scale_bytes * task.cut.ofm[2] / piece * memory.read_latency_cycles


def _vector(
    task: Task, target: Target, moved: Traffic, read: float, write: float, memory: Literal["sram", "dram"]
) -> Stages:
    work, cut, buffers = task.work, task.cut, target.buffers
    channels = task.target.size[2]
    filled = fill(channels, target.brick_channels) / channels if task.target.brick else 1.0
    between = max(read, write) if buffers.reads_while_writing else read + write
    operations = task.vector_ops if work.form != "resize" or target.resize_unit is None else math.prod(work.ofm)
    block = math.prod(cut.ofm)
    busy = block / task.rate
    issue, moving = (between + busy) / buffers.blocks_under_way, between / buffers.blocks_under_way
    one = Stage(max(busy, issue), busy, 0.0, moving)
    count = operations * filled / block
    if task.unit == "table":
        return Stages(count, one, Stage(), load_cycles(task, target), 0.0, memory, "table")
    return Stages(count, one, Stage(), 0.0, 0.0, memory)


def load_cycles(task: Task, target: Target) -> float:
    """Cycles until the table of ``task`` is in the unit, from the start of the task."""
    unit = target.table_unit
    if unit is None or not task.constant_bytes:
        return 0.0
    speed = rate(target, target.dram, "weights")
    return target.dram.read_latency_cycles + task.constant_bytes / min(speed, unit.load_bytes_per_cycle or speed)


def mac_cycles(task: Task, target: Target, decoded: bool = True) -> float:
    """Cycles of the array for one block. Tiles side by side share a step's weights, which have to be ``decoded``."""
    work, cut, array = task.work, task.cut, target.mac_array
    rows, columns, depth = map(pieces, cut.ofm, cut.tile)
    area = rows * columns
    decode = 0.0
    if task.weights and decoded and target.weights.decoded_per_cycle:
        at_once = target.weights.decoded_per_step if task.stream is None else _step_weights(task)
        decode = at_once * cut.tile[2] / target.weights.decoded_per_cycle
    slowdown = array.slowdown(task.dtype) or 1.0
    total = 0.0
    for taps in _subkernels(work, array.max_kernel):
        groups = 1
        if work.form != "sums":
            assert array.windows is not None
            steps, cycles = 1, max(array.windows.least_taps, taps) * array.windows.cycles_per_tap
        else:
            steps, groups, cycles = _steps(task, taps)
        spent = max(decode, cycles * slowdown * area) * steps * depth
        if area == 1:  # nothing hides the latency of the array
            spent += array.lone_tile_cycles * (steps if depth == 1 else (steps - 1) * depth)
        total += spent * groups
    if array.skips_padding and work.form == "sums" and not work.own_channel and work.ifm[2] <= 2:
        total /= 2
    return total if work.own_channel or work.form != "sums" else total * pieces(work.ifm[2], cut.ifm[2])


def _step_weights(task: Task) -> int:
    """Weights of an output channel in a whole step: nothing that only fills it is stored."""
    step, taps = task.cut.step, min(task.cut.step.taps, task.work.taps)
    return taps if task.work.own_channel else taps * min(step.channels, task.cut.ifm[2])


def _steps(task: Task, taps: int) -> tuple[int, int, float]:
    """Steps of a pass over a block with ``taps``, groups of channels in it, cycles of one step and tile."""
    step, channels = task.cut.step, task.cut.ifm[2]
    cycles: float = step.cycles
    if task.work.own_channel:
        return pieces(taps, step.taps), 1, cycles
    if step.channels_per_cycle and channels < step.channels:
        cycles = max(1, channels // step.channels_per_cycle)
    return pieces(taps, step.taps), pieces(channels, step.channels), cycles


def _subkernels(work: Work, most: int | None) -> list[int]:
    """Taps of the pieces into which a large kernel is cut."""
    rows, columns = work.kernel
    most = most or max(rows, columns)
    return [min(most, rows - y) * min(most, columns - x) for y in range(0, rows, most) for x in range(0, columns, most)]


@dataclass(frozen=True)
class Slices:
    """Staged weights come in slices: ``first`` of them is the share that comes early, ``later`` that of each other.

    ``core`` are cycles of the core with what it waits for them, ``last`` those of the last slice. A task that stages
    none is one slice.
    """

    core: float
    last: float
    first: float = 1.0
    later: float = 0.0


def slices(task: Task, target: Target, moved: Traffic, core: float, slack: float) -> Slices:
    """Slices of output channels: the first comes early, later ones while the slice before them runs."""
    if not moved.staged:
        return Slices(core, core)
    speed, latency = staging_rate(target), target.dram.read_latency_cycles
    channels, granule = task.work.ofm[2], task.cut.ofm[2]
    whole, before = moved.weights / speed + latency, moved.early / speed + latency
    rest, part, last = 1 - moved.early / moved.weights, 0.0, core
    if rest > 0:
        part = min(max(float(_GROUP), fill(int(channels * core * (1 - rest) / whole), granule)), channels * rest)
        last = core / (1 + math.ceil(channels * rest / part))
    waited = max(core + max(0.0, before - slack), whole - slack + last)
    return Slices(waited, last, 1 - rest, part / channels)
