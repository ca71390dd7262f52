"""Bytes that a task moves: what is read again for each block, bursts that are paid whole, weights that are staged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qatlib.compiler.banks import WEIGHTS, Lay, bank_cycles
from qatlib.compiler.hardware import Channel, Dram, Memory, fill, pieces
from qatlib.compiler.target import Target
from qatlib.compiler.tasks import Map, Task
from qatlib.ops.work import Size

_GROUP = 16
"""Channels of a slice of weights, at least."""


@dataclass(frozen=True)
class Traffic:
    """Bytes by channel on each bus, bursts filled up.

    ``in_burst`` and ``out_burst`` are bytes moved for one that is asked for. ``weights`` are the compressed weights of
    the whole task; if they are ``staged``, ``early`` of them arrive under the task before and are charged to no bus.
    ``banks`` are cycles for which those of the SRAM are busy, if each has addresses of its own.
    """

    sram: Mapping[Channel, float]
    dram: Mapping[Channel, float]
    in_burst: float
    out_burst: float
    weights: int
    scales: int
    staged: bool
    early: float
    banks: float = 0.0


def move(
    task: Task, target: Target, off: Collection[str], staging: bool, slack: float, lay: Lay | None = None
) -> Traffic:
    """What ``task`` moves where the values in ``off`` live off chip and others in the SRAM.

    Weights that are read more than once are staged in the SRAM if ``staging`` allows; ``slack`` are the cycles of the
    task before under which they can already arrive. ``lay`` says where in the SRAM all that is; without it each map is
    taken to have banks of its own.
    """
    work, cut = task.work, task.cut
    buses: dict[bool, dict[Channel, float]] = {False: defaultdict(float), True: defaultdict(float)}

    streams: dict[str, float] = defaultdict(float)

    def use(at: Map, channel: Channel, amount: float) -> None:
        buses[at.name in off][channel] += amount
        if at.name not in off:
            streams[at.name] += amount

    rows, columns, channels = work.ofm
    areas = pieces(rows, cut.ofm[0]) * pieces(columns, cut.ofm[1])
    in_burst = out_burst = 1.0
    if task.source is not None:
        memory = memory_of(target, task.source.name in off)
        in_burst = burst_factor(memory, task.source, target, cut.ifm_block, work.ifm[2], write=False)
        use(task.source, "maps" if task.engine == "array" else "stream", _read(task, target, areas) * in_burst)
    for other in task.beside:
        again = areas if work.factor is not None else 1
        use(other, "stream", math.prod(_stored(other.size, other, target)) * other.element_bytes * again)
    out_burst = burst_factor(
        memory_of(target, task.target.name in off), task.target, target, cut.ofm_block, channels, write=True
    )
    written = math.prod(_stored(task.target.size, task.target, target)) * task.target.element_bytes
    use(task.target, "write", written * out_burst)
    buses[True]["weights"] += task.constant_bytes

    weights = compressed(task, target)
    scales = target.weights.scale_bytes * channels * work.times if weights else 0
    staged = bool(weights) and areas > 1 and staging
    early = 0.0
    if weights:
        buses[True]["scales"] += scales * areas
        if staged:
            early = min(weights, max(weights * min(1, _GROUP / channels), slack * staging_rate(target)))
            buses[True]["dma"] += weights - early
            buses[False]["write"] += weights - early
            buses[False]["weights"] += weights * areas
            streams[WEIGHTS] += weights - early + weights * areas
        else:
            buses[True]["weights"] += weights * areas
    banks = bank_cycles(target, streams, lay)
    return Traffic(buses[False], buses[True], in_burst, out_burst, weights, scales, staged, early, banks)


def _read(task: Task, target: Target, areas: int) -> float:
    """Bytes of the main input that are asked for."""
    work, cut, source = task.work, task.cut, task.source
    assert source is not None
    if task.engine == "vector" or work.form in ("copy", "elements", "resize"):
        whole = math.prod(_stored(source.size, source, target))
        if work.form == "copy":  # of a larger map only what is copied
            whole = min(whole, math.prod(_stored(task.target.size, task.target, target)))
        return whole * source.element_bytes
    window = target.mac_array.max_kernel or 2**16
    again = areas * pieces(work.kernel[0], window) * pieces(work.kernel[1], window)
    again *= 1 if work.own_channel else pieces(work.ofm[2], cut.ofm[2])
    channels = fill(work.ifm[2], target.brick_channels) if source.brick else work.ifm[2]
    return cut.ifm[0] * cut.ifm[1] * channels * again * work.times * source.element_bytes


def _stored(size: Size, at: Map, target: Target) -> Size:
    return (*size[:2], fill(size[2], target.brick_channels) if at.brick else size[2])


def compressed(task: Task, target: Target) -> int:
    """Bytes of the weights as stored; of a target that does not compress them itself if none is 0."""
    if not task.weights:
        return 0
    if task.stream is not None:
        return fill(len(task.stream.data), target.sram.alignment)
    work, step, stored = task.work, task.cut.step, target.weights
    inputs, outputs = work.ifm[2], fill(work.ofm[2], stored.stored_outputs)
    taps = fill(work.taps, step.stored_taps or step.taps)
    full = taps * (outputs if work.own_channel else fill(inputs, step.channel_granule) * outputs) * work.times
    filling = max(0, full - task.weights)
    cheap = max(stored.padding_least * task.weights, stored.padding * min(filling, task.weights))
    size = (task.weights + min(filling, cheap)) * task.weight_bytes
    return fill(int(size) + stored.header_bytes, target.sram.alignment)


def burst_factor(memory: Memory, at: Map, target: Target, block: Size, channels: int, write: bool) -> float:
    """Bytes that cross the bus for one that is asked for, by the run of bytes that lie together."""
    if at.brick:
        run = target.brick_channels * block[1]
    else:
        piece = target.brick_channels if write and target.brick_channels > 1 else block[2]
        run = min(piece, block[2]) * (block[1] if channels == block[2] <= piece else 1)
    return memory.burst_bytes / min(memory.burst_bytes, max(1, run * at.element_bytes))


def memory_of(target: Target, off: bool) -> Memory:
    return target.dram if off else target.sram


def width(target: Target, memory: Memory) -> float:
    """Bytes a cycle of a memory's bus, or of all its banks if those are slower."""
    if isinstance(memory, Dram):
        return target.dram_bytes_per_cycle
    banks = target.sram.banks
    most = target.sram.bytes_per_cycle
    return most if banks is None else min(most, banks.count * banks.bytes_per_cycle)


def stream_width(target: Target, memory: Memory) -> float:
    """Bytes a cycle of what lies together: it is in one bank at a time, if banks have ranges of addresses."""
    most = width(target, memory)
    if isinstance(memory, Dram) or target.sram.banks is None or target.sram.bank_bytes is None:
        return most
    return min(most, target.sram.banks.bytes_per_cycle)


_SHARE = 0.8
"""Of what could be under way at best, once for the memory and once for the channel."""


def rate(target: Target, memory: Memory, channel: Channel) -> float:
    """Bytes a cycle of one channel: what can be under way over the latency (Little's law), at most the bus."""
    writes = channel == "write"
    count = memory.outstanding_writes if writes else memory.outstanding_reads
    latency = memory.write_latency_cycles if writes else memory.read_latency_cycles
    most = width(target, memory)
    if target.in_flight is None or not count or not latency:
        return most
    under_way = _SHARE * count * memory.burst_bytes
    if not writes:
        under_way = min(under_way, getattr(target.in_flight, channel))
    return min(most, _SHARE * under_way / latency)


def staging_rate(target: Target) -> float:
    """Bytes a cycle at which weights are copied into the SRAM."""
    sram = min(rate(target, target.sram, "write"), stream_width(target, target.sram))
    return min(rate(target, target.dram, "dma"), sram)


def bus_cycles(target: Target, memory: Memory, moved: Mapping[Channel, float]) -> float:
    """Cycles for which a bus is busy: with all that is moved, or with its slowest channel."""
    slowest = max((amount / rate(target, memory, channel) for channel, amount in moved.items()), default=0.0)
    return max(sum(moved.values()) / width(target, memory), slowest)
