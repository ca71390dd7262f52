"""Blocks, traffic and cycles of single ops, against loops and against sums done by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.compiler import Target, load_target
from qatlib.compiler.blocks import choose_step, choose_tile, cut_array
from qatlib.compiler.cycles import mac_cycles, time
from qatlib.compiler.job import describe
from qatlib.compiler.steps import order_steps
from qatlib.compiler.tasks import Task
from qatlib.compiler.traffic import burst_factor, compressed, move, rate, staging_rate
from qatlib.ops.work import Work
from tests.compiler.compiler_nets import Net, tiny

U55, U85 = load_target("ethos-u55-256-like"), load_target("ethos-u85-256-like")
DRAM = load_target("ethos-u85-512-like")


def only_task(net: Net, output: str, target: Target) -> Task:
    """The pass of the op that makes ``output``."""
    program = net.program(output)
    job = describe(program, order_steps(program), target)
    (task,) = next(passes for step, passes in zip(job.steps, job.passes, strict=True) if step.op.output == output)
    return task


def conv(target: Target, ins: int, size: int, outs: int, kernel: int = 3, **more: Any) -> Task:
    """A convolution in the middle of a net, with its maps in bricks where the target has them."""
    net = Net()
    x = net.clamp(net.input((ins, size, size)))
    y = net.conv(x, outs, kernel, **more)
    program = net.program(net.clamp(y))
    job = describe(program, order_steps(program), target)
    (task,) = job.passes[1]
    return task


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "channels", "taps", "order"),
    [
        (U55, 3, 9, "kernel"),  # as few channels as a kernel-first step takes
        (U55, 16, 9, "kernel"),  # 16/16 x 9/12 = 0.75 against 16/32
        (U55, 24, 9, "kernel"),  # 24/24 x 9/12 = 0.75 against 24/32, as good
        (U55, 32, 9, "depth"),  # 0.75 against 1
        (U55, 64, 1, "depth"),
        (U85, 64, 9, "kernel"),  # on the U85 nine taps fill a group of five and one of four
        (U85, 16, 1, "kernel"),  # 1/2 against 16/64
        (U85, 64, 1, "depth"),
    ],
)  # fmt: skip
def test_the_order_that_fills_its_steps_better(target: Target, channels: int, taps: int, order: str) -> None:
    size = math.isqrt(taps)
    work = Work("sums", (8, 8, channels), (8, 8, 16), (size, size))
    array = target.mac_array
    assert choose_step(work, target) is {"kernel": array.kernel_first, "depth": array.depth_first}[order]


def test_the_tile_with_the_least_waste() -> None:
    assert choose_tile(Work("sums", (9, 4, 8), (9, 4, 8)), U85) == (1, 4, 8)
    assert choose_tile(Work("sums", (8, 2, 8), (8, 2, 8)), U85) == (2, 2, 8)
    assert choose_tile(Work("sums", (1, 8, 8), (1, 8, 8)), U55) == (1, 4, 8)
    assert choose_tile(Work("windows", (8, 8, 16), (8, 8, 16)), U85) == (1, 2, 16)


def fits(target: Target, block: tuple[int, int, int], work: Work, tile: tuple[int, int, int], deep: int) -> bool:
    """Whether two blocks fit the buffers of an accelerator like U55 or U85, by the text of docs/targets.md."""

    def up(n: int, m: int) -> int:
        return math.ceil(n / m) * m

    b = target.buffers
    rows = up((block[0] - 1) * work.stride[0] + min(work.kernel[0], 8), tile[0])
    columns = up((block[1] - 1) * work.stride[1] + min(work.kernel[1], 8), tile[1])
    ifm = rows * columns * up(min(work.ifm[2], deep), b.input_channels)
    acc = block[0] * block[1] * up(block[2], tile[2]) * 4
    if b.shared_bytes is not None:
        return up(2 * up(ifm, 1024), b.input_granule) + up(2 * up(acc, 1024), b.accumulator_granule) <= b.shared_bytes
    assert b.input_bytes
    assert b.accumulator_bytes
    return 2 * ifm <= b.input_bytes and 2 * acc <= b.accumulator_bytes


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([U55, U85]), st.integers(4, 40), st.integers(4, 40), st.sampled_from([16, 32, 64, 96]),
    st.sampled_from([16, 32, 64, 128]), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]),
)  # fmt: skip
def test_no_block_that_fits_reads_less(
    target: Target, rows: int, columns: int, ins: int, outs: int, kernel: int, stride: int
) -> None:
    work = Work("sums", (rows * stride, columns * stride, ins), (rows, columns, outs), (kernel,) * 2, (stride,) * 2)
    cut = cut_array(work, target)
    tile, step = cut.tile, cut.step
    deep = step.pass_channels or step.channels

    def reads(block: tuple[int, int, int]) -> float:
        h, w, d = block
        area = [math.ceil(((n - 1) * stride + kernel) / t) * t for n, t in zip((h, w), tile[:2], strict=True)]
        inputs = area[0] * area[1] * ins * (rows / h) * (columns / w) * math.ceil(outs / d)
        weights = kernel * kernel * ins * outs * math.ceil(rows / h) * math.ceil(columns / w)
        held = (
            area[0]
            * area[1]
            * math.ceil(min(ins, deep) / target.buffers.input_channels)
            * target.buffers.input_channels
        )
        return (inputs + weights) / (2 if math.prod(work.ifm) < 2 * held else 1)

    def up_to(size: int, granule: int, most: int) -> range:
        return range(granule, math.ceil(min(size, most) / granule) * granule + 1, granule)

    most = target.buffers.max_block
    options = [
        block
        for block in itertools.product(
            up_to(rows, tile[0], most[0]), up_to(columns, tile[1], most[1]), up_to(outs, 16, most[2])
        )
        if fits(target, block, work, tile, deep)
    ]
    best = min(map(reads, options))
    chosen = [b for b in options if tuple(map(min, b, work.ofm)) == cut.ofm]
    assert min(map(reads, chosen)) == pytest.approx(best)


# -- traffic -----------------------------------------------------------------------------------------------------------


def test_input_is_read_again_for_every_block_and_weights_for_every_area() -> None:
    task = conv(U55, 64, 56, 64)
    (h, w, d), (ih, iw, _) = task.cut.ofm, task.cut.ifm
    areas = math.ceil(56 / h) * math.ceil(56 / w)
    moved = move(task, U55, (), staging=True, slack=0)
    assert areas > 1
    assert moved.sram["maps"] == ih * iw * 64 * areas * math.ceil(64 / d)
    assert moved.staged
    assert moved.sram["weights"] == moved.weights * areas
    assert moved.dram["dma"] == moved.weights - moved.early
    assert moved.dram["scales"] == 10 * 64 * areas
    streamed = move(task, U55, (), staging=False, slack=0)
    assert (streamed.dram["dma"], streamed.dram["weights"]) == (0, moved.weights * areas)


def test_few_channels_side_by_side_pay_whole_bursts() -> None:
    net = Net()
    image = only_task(net, net.conv(net.input((3, 64, 64)), 16, stride=2), U85)
    assert image.source is not None
    assert not image.source.brick
    # a block takes 16 channels of which there are 3: runs of 16 in bursts of 64
    assert (image.cut.ifm_block[2], image.cut.ifm[2]) == (16, 3)
    assert burst_factor(U85.sram, image.source, U85, (8, 8, 16), 3, write=False) == 64 / 16
    assert burst_factor(U85.sram, image.source, U85, (8, 32, 3), 3, write=False) == 1
    brick = conv(U85, 32, 16, 32).source
    assert brick is not None
    assert burst_factor(U85.dram, brick, U85, (4, 8, 16), 32, write=False) == 1
    assert burst_factor(U85.dram, brick, U85, (4, 2, 16), 32, write=False) == 128 / 32


def test_a_channel_gives_what_is_under_way_over_the_latency() -> None:
    assert rate(DRAM, DRAM.dram, "maps") == pytest.approx(0.8 * 2048 / 500)
    assert rate(DRAM, DRAM.dram, "scales") == pytest.approx(0.8 * 256 / 500)
    assert rate(DRAM, DRAM.dram, "write") == pytest.approx(0.8 * 0.8 * 32 * 128 / 250)
    assert rate(DRAM, DRAM.sram, "maps") == pytest.approx(min(32, 0.8 * 0.8 * 16 * 64 / 32))
    assert rate(U55, U55.dram, "maps") == 1
    assert staging_rate(DRAM) == pytest.approx(0.8 * 2048 / 500)


def test_weights_are_stored_with_what_fills_their_steps() -> None:
    assert compressed(conv(U55, 64, 8, 64), U55) == 64 * 64 * 9 + 32  # nothing to fill
    # 9 taps stored as 10: the tenth costs as much as a weight
    assert compressed(conv(U85, 64, 8, 64), U85) == 64 * 64 * 10 + 32
    # 32 of 64 channels in a depth-first step would be empty: the kernel-first step stores two taps for one
    assert compressed(conv(U85, 32, 8, 32, 1), U85) == 32 * 32 + 32 * 32 // 2 + 32
    assert compressed(conv(tiny(), 3, 8, 8), tiny()) == 224  # 216 in lines of 16


# -- cycles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "ins", "kernel", "groups", "cycles"),
    [
        # a block of h x w x d outputs is hw/4 tiles, d/8 deep; a step is 32 channels, or 8 channels and 4 taps
        (U55, 64, 3, 1, lambda tiles, d: 4 * tiles * 9 * d / 8 * 2),
        (U55, 16, 3, 1, lambda tiles, d: 4 * tiles * 3 * d / 8 * 2),
        (U55, 64, 3, 64, lambda tiles, d: 4 * tiles * 3 * d / 8),
        (U85, 64, 1, 1, lambda tiles, d: 8 * tiles * d / 8),
        (U85, 64, 3, 1, lambda tiles, d: 4 * tiles * 3 * d / 8 * 8),  # 9 taps are 3 steps, 64 channels 8 groups
    ],
)  # fmt: skip
def test_cycles_of_a_block(target: Target, ins: int, kernel: int, groups: int, cycles: Any) -> None:
    task = conv(target, ins, 32, 64, kernel, groups=groups)
    h, w, d = task.cut.ofm
    tiles = math.ceil(h / task.cut.tile[0]) * math.ceil(w / task.cut.tile[1])
    assert tiles >= 8  # enough to hide the decoder
    assert mac_cycles(task, target) == pytest.approx(cycles(tiles, d))


def test_a_small_map_waits_for_its_weights() -> None:
    task = conv(U55, 64, 4, 32, 1)
    assert task.cut.ofm == (4, 4, 32)
    # 4 tiles of 4 cycles would do; 32 weights for 8 outputs take 32
    assert mac_cycles(task, U55) == 32 * 2 * 4
    assert mac_cycles(task, U55, decoded=False) == 16 * 2 * 4
    assert time(task, U55, ()).limit in ("weights", "dram")


def test_a_map_off_chip_moves_its_bytes_to_the_other_bus() -> None:
    task = conv(DRAM, 128, 32, 16, 1)
    assert task.source is not None
    inside, away = time(task, DRAM, ()), time(task, DRAM, {task.source.name})
    assert away.sram_bytes < inside.sram_bytes
    assert away.dram_bytes > inside.dram_bytes
    assert away.limit == "dram"
    assert away.cycles == away.dram > inside.cycles


def test_weights_that_come_under_the_op_before_are_not_waited_for() -> None:
    task = conv(U55, 256, 14, 256)
    first, warm = time(task, U55, ()), time(task, U55, (), slack=10**7)
    assert first.weight_wait > 0
    assert warm.weight_wait == 0
    assert first.limit == "weights" or first.dram > first.core // 2
    assert warm.first_slice == 0 == warm.next_slice or warm.next_slice == 0
    assert first.first_slice + first.next_slice < first.weight_bytes


@pytest.mark.parametrize("target", [U55, U85, DRAM, load_target("bayes-like")], ids=lambda target: target.name)
def test_no_faster_than_the_array_the_vector_unit_or_a_bus(target: Target) -> None:
    for ins, size, outs, kernel, groups in (
        (16, 32, 96, 1, 1),
        (64, 14, 64, 3, 1),
        (64, 14, 64, 3, 64),
        (3, 64, 16, 7, 1),
    ):
        task = conv(target, ins, size, outs, kernel, groups=groups)
        timing = time(task, target, ())
        assert timing.cycles >= task.macs / target.mac_array.peak
        assert timing.cycles + 1 >= size * size * outs / task.rate
        assert timing.cycles >= max(timing.sram, timing.dram, timing.core)
        assert timing.cycles == max(timing.sram, timing.dram, timing.core)
