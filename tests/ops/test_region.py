"""What an operator states of regions: computed from the boxes that it names, a region is that of the whole output."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qatlib.emulator import Emulator
from qatlib.integer import exact_kernels
from qatlib.ops.base import BY_KIND
from qatlib.ops.region import Box, Need, Regions
from qatlib.program import Op, Value
from tests.kind_nets import NETS

WHOLE = {"quantize", "dequantize", "constant", "float_op", "reshape"}
"""Kinds that are never cut: the host's, what is no work, and reshapes, which no box of axes describes."""


def cropped(value: Value, x: Tensor, need: Need) -> Tensor:
    """The box of ``x`` with its padding; the axis of the batch stays as it is."""
    pads: list[int] = []
    for axis, (size, (start, stop)) in enumerate(zip(value.shape, need.box, strict=True)):
        if size < 0:
            assert (start, stop) == (0, -size)
            pads += [0, 0]
            continue
        low, high = min(max(start, 0), size), max(min(stop, size), 0)
        x = x.narrow(axis, low, max(0, high - low))
        pads += [low - start, stop - start - max(0, high - low) - (low - start)]
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    return F.pad(x, [side for pair in reversed(pairs) for side in pair], value=need.fill)


def random_box(rng: random.Random, value: Value, regions: Regions) -> Box:
    """A box within the axes that can be cut; whole groups of channels, or a piece of one."""
    axes, box = regions.axes, []
    free = {*axes.rows, *axes.columns, *axes.channels}
    for axis, size in enumerate(value.sizes()):
        start, stop = sorted(rng.sample(range(size + 1), 2)) if axis in free else (0, size)
        if regions.group and axis in axes.channels and start // regions.group != (stop - 1) // regions.group:
            start, stop = start - start % regions.group, min(size, -(-stop // regions.group) * regions.group)
        box.append((start, stop))
    return tuple(box)


@pytest.mark.parametrize("name", NETS)
def test_a_part_is_that_region_of_the_whole(name: str) -> None:
    net, rng = NETS[name], random.Random(name)
    program = net.program()
    emulator = Emulator(program)
    for op, arguments, output in emulator.steps(*(x[:2] for x in net.inputs)):
        regions = BY_KIND[op.kind].regions(op, program)
        assert (regions is None) == (op.kind in WHOLE), op.kind
        if regions is None:
            continue
        for _ in range(12):
            check(emulator, op, regions, random_box(rng, program.values[op.output], regions), arguments, output)


def check(
    emulator: Emulator, op: Op, regions: Regions, box: Box, arguments: tuple[Tensor, ...], output: Tensor
) -> None:
    values, part = emulator.program.values, regions.part(box)
    read = [
        cropped(values[name], x, need)
        for name, x, need in zip(op.inputs, arguments, part.needs, strict=True)
        if need is not None
    ]
    with exact_kernels():
        ours = emulator.kernel(op, part)(*read)
    theirs = cropped(values[op.output], output, Need(box))
    assert ours.shape == theirs.shape, (op.name, box)
    assert torch.equal(ours.double(), theirs.double()), (op.name, box)


@pytest.mark.parametrize("block", [(1, 1, 1), (2, 3, 5), (3, 2, 16), (7, 64, 4), (64, 64, 64)])
@pytest.mark.parametrize("name", NETS)
def test_boxes_cover_the_output_once(name: str, block: tuple[int, int, int]) -> None:
    program = NETS[name].program()
    for op in program:
        regions = BY_KIND[op.kind].regions(op, program)
        if regions is None:
            continue
        sizes = program.values[op.output].sizes()
        seen = torch.zeros(sizes, dtype=torch.int64)
        for box in regions.boxes(sizes, block):
            seen[tuple(slice(*span) for span in box)] += 1
        assert bool((seen == 1).all()), op.name
