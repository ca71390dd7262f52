"""Cycles of a task from its cut and its traffic, and which part of the machine they are due to."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from qatlib.compiler.hardware import fill, pieces
from qatlib.compiler.target import Target
from qatlib.compiler.tasks import Task
from qatlib.compiler.traffic import Traffic, bus_cycles, memory_of, move, staging_rate, width
from qatlib.ops.work import Work

Limit = Literal["mac", "vector", "weights", "sram", "dram"]
_GROUP = 16


@dataclass(frozen=True)
class Timing:
    """Estimate for one task, in cycles and bytes.

    ``core`` is how long array and vector unit need with all that they wait for; ``cycles`` the largest of it and the
    two buses. ``limit`` names what it is due to. ``slack`` is how long the last slice of weights runs, under which
    those of the next task can arrive; ``first_slice`` and ``next_slice`` are the SRAM that staged weights take.
    """

    cycles: int
    core: int
    mac: int
    vector: int
    weight_wait: int
    sram: int
    dram: int
    limit: Limit
    slack: int
    sram_bytes: int
    dram_bytes: int
    weight_bytes: int
    first_slice: int
    next_slice: int


def time(task: Task, target: Target, off: Collection[str], staging: bool = True, slack: float = 0) -> Timing:
    """What ``task`` takes; for ``off``, ``staging`` and ``slack`` see :func:`.traffic.move`."""
    moved = move(task, target, off, staging, slack)
    parts = _array(task, target, moved, off) if task.engine == "array" else _vector(task, target, moved, off)
    waited = _weights(task, target, moved, parts.core, slack)
    sram, dram = bus_cycles(target, target.sram, moved.sram), bus_cycles(target, target.dram, moved.dram)
    cycles = max(waited.core, sram, dram)
    shares: dict[Limit, float] = {
        "mac": parts.mac, "vector": parts.vector, "weights": max(parts.waited, waited.core - parts.core),
        "sram": parts.moving if not parts.far else 0, "dram": parts.moving if parts.far else 0,
    }  # fmt: skip
    limit: Limit = max(shares, key=lambda name: shares[name])
    if cycles > waited.core:
        limit = "sram" if sram >= dram else "dram"
    return Timing(
        cycles=_whole(cycles),
        core=_whole(waited.core),
        mac=_whole(parts.mac),
        vector=_whole(parts.vector),
        weight_wait=_whole(waited.core - parts.core),
        sram=_whole(sram),
        dram=_whole(dram),
        limit=limit,
        slack=_whole(waited.last),
        sram_bytes=_whole(sum(moved.sram.values())),
        dram_bytes=_whole(sum(moved.dram.values()) + moved.early),
        weight_bytes=moved.weights,
        first_slice=_whole(waited.first),
        next_slice=_whole(waited.next),
    )


def _whole(amount: float) -> int:
    """Begun cycles and bytes count; what a division leaves behind the comma does not."""
    return math.ceil(round(amount, 6))


@dataclass(frozen=True)
class _Parts:
    """Cycles of the whole task: of the core, and of its parts if each ran alone.

    ``waited`` is what it waits for decoded weights or for scales, ``moving`` the time in which no block overlaps
    another; it is off-chip memory's if ``far``.
    """

    core: float
    mac: float
    vector: float
    waited: float
    moving: float
    far: bool


def _moving(task: Task, target: Target, moved: Traffic, off: Collection[str]) -> tuple[float, float, bool]:
    """Cycles to read one block and to write one, and whether the slower of the two is off chip."""
    read = 0.0
    far = task.target.name in off
    sink = memory_of(target, far)
    out_bytes = math.prod(task.cut.ofm) * task.target.element_bytes
    write = sink.write_latency_cycles + out_bytes * moved.out_burst / width(target, sink)
    if task.source is not None:
        away = task.source.name in off
        source = memory_of(target, away)
        in_bytes = math.prod(task.cut.ifm) * task.source.element_bytes
        read = source.read_latency_cycles + in_bytes * moved.in_burst / width(target, source)
        far = away if read >= write else far
    return read, write, far


def _array(task: Task, target: Target, moved: Traffic, off: Collection[str]) -> _Parts:
    """Blocks run one after the other, each as long as its slowest part; ``blocks_under_way`` of them overlap."""
    work, cut, buffers = task.work, task.cut, target.buffers
    count = math.prod(map(pieces, work.ofm, cut.tile)) / math.prod(map(pieces, cut.ofm, cut.tile)) * work.times
    mac, plain = (mac_cycles(task, target, decoded) for decoded in (True, False))
    vector = float(math.ceil(math.prod(cut.ofm) / task.rate))
    out = max(vector, _scale_wait(task, target, moved))
    read, write, far = _moving(task, target, moved, off)
    ends = 0.0
    if buffers.reads_while_writing:
        between, ends = (abs(read - write) if count > 1 else 0.0), read + write
    else:
        between = read + write
    issue = (between + mac + out) / buffers.blocks_under_way
    a, b = max(mac, issue), max(out, issue)
    core = max(a, b) * count + min(a, b) + ends
    moving = between / buffers.blocks_under_way * count + ends
    waited = max(mac - plain, out if out > vector else 0.0) * count
    return _Parts(core, plain * count, vector * count, waited, moving, far)


def _scale_wait(task: Task, target: Target, moved: Traffic) -> float:
    """Cycles in which the scales of a block come, piece by piece."""
    piece = target.weights.scale_fetch_bytes
    if not moved.scales or piece is None:
        return 0.0
    memory = target.sram if moved.staged and target.buffers.reads_while_writing else target.dram
    return target.weights.scale_bytes * task.cut.ofm[2] / piece * memory.read_latency_cycles


def _vector(task: Task, target: Target, moved: Traffic, off: Collection[str]) -> _Parts:
    work, cut, buffers = task.work, task.cut, target.buffers
    channels = task.target.size[2]
    filled = fill(channels, target.brick_channels) / channels if task.target.brick else 1.0
    read, write, far = _moving(task, target, moved, off)
    between = max(read, write) if buffers.reads_while_writing else read + write
    operations = task.vector_ops if work.form != "resize" or target.resize_unit is None else math.prod(work.ofm)
    per_element = 1 / task.rate
    block = math.prod(cut.ofm)
    elements = operations * filled
    issue = (between / block + per_element) / buffers.blocks_under_way
    moving = elements * between / block / buffers.blocks_under_way
    return _Parts(elements * max(per_element, issue), 0.0, elements * per_element, 0.0, moving, far)


def mac_cycles(task: Task, target: Target, decoded: bool = True) -> float:
    """Cycles of the array for one block. Tiles side by side share a step's weights, which have to be ``decoded``."""
    work, cut, array = task.work, task.cut, target.mac_array
    rows, columns, depth = map(pieces, cut.ofm, cut.tile)
    area = rows * columns
    decode = 0.0
    if task.weights and decoded and target.weights.decoded_per_cycle:
        decode = target.weights.decoded_per_step * cut.tile[2] / target.weights.decoded_per_cycle
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
class _Waited:
    """Cycles of the core with what it waits for weights, of its last slice of channels; bytes of two slices."""

    core: float
    last: float
    first: float
    next: float


def _weights(task: Task, target: Target, moved: Traffic, core: float, slack: float) -> _Waited:
    """Staged weights come in slices of channels: the first early, later ones while the slice before them runs."""
    if not moved.staged:
        return _Waited(core, core, 0.0, 0.0)
    speed, latency = staging_rate(target), target.dram.read_latency_cycles
    channels, granule = task.work.ofm[2], task.cut.ofm[2]
    whole, before = moved.weights / speed + latency, moved.early / speed + latency
    rest, part, last = 1 - moved.early / moved.weights, 0.0, core
    if rest > 0:
        part = min(max(float(_GROUP), fill(int(channels * core * (1 - rest) / whole), granule)), channels * rest)
        last = core / (1 + math.ceil(channels * rest / part))
    waited = max(core + max(0.0, before - slack), whole - slack + last)
    stored = moved.weights + moved.scales
    return _Waited(waited, last, stored * (1 - rest), stored * part / channels)
