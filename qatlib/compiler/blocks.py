"""How work is cut for the core: the order of the sums, the tile of outputs side by side, the blocks in the buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qatlib.compiler.hardware import Step, fill, pieces
from qatlib.compiler.target import Target
from qatlib.ops.work import Size, Work

_Ints = NDArray[np.int64]
_VECTOR_TILE: Size = (1, 1, 1)
_ACCUMULATOR_BYTES = 4


@dataclass(frozen=True)
class Cut:
    """Blocks of outputs and of the inputs that they need: as buffers hold them, and not larger than the maps."""

    step: Step
    tile: Size
    ofm_block: Size
    ifm_block: Size
    ofm: Size
    ifm: Size


def cut_array(work: Work, target: Target) -> Cut:
    """The cut of work for the array."""
    step = choose_step(work, target)
    tile = choose_tile(work, target)
    return _cut(work, target, step, tile, operands=1, accumulates=True)


def cut_vector(work: Work, target: Target, operands: int) -> Cut:
    """The cut of work for the vector unit, or for a unit of its own, which reads ``operands`` maps of equal size."""
    step = target.mac_array.depth_first
    unit = target.resize_unit
    if work.form == "resize" and unit is not None and unit.columns:
        (_, columns, channels), narrow = work.ofm, work.ifm[1]
        width = min(columns, max(1, unit.columns * columns // narrow))
        depth = min(channels, target.buffers.block_channels)
        return _cut_to(work, step, _VECTOR_TILE, (1, width, depth), (2, width, depth))
    return _cut(work, target, step, choose_tile(work, target), operands=operands, accumulates=False)


def choose_step(work: Work, target: Target) -> Step:
    """The order of the sums whose steps are filled better; kernel first where both are filled as well."""
    array = target.mac_array
    if work.own_channel or work.form != "sums":
        return array.own_channel or Step(channels=1, cycles=array.depth_first.cycles)
    first, channels = array.kernel_first, work.ifm[2]
    if first is None:
        return array.depth_first
    if channels <= first.channels or first.fills(channels, work.taps) >= array.depth_first.fills(channels, work.taps):
        return first
    return array.depth_first


def choose_tile(work: Work, target: Target) -> Size:
    """The tile with the least waste at the edges; of equal ones the first."""
    array = target.mac_array
    own = work.own_channel or work.form != "sums"
    if array.row_tile and not own and work.ofm[0] == work.kernel[0] == 1 and work.ofm[1] % 2 == 0:
        return array.row_tile
    options = array.own_channel_tiles or array.tiles if own else array.tiles
    return min(options, key=lambda tile: math.prod(map(fill, work.ofm, tile)))


def _cut(work: Work, target: Target, step: Step, tile: Size, operands: int, accumulates: bool) -> Cut:
    """Of all blocks of whole tiles that fit the buffers, the one that reads the least; of equal ones the largest.

    Work of the vector unit takes the largest block that fits. If none fits, the one with the smallest input is taken.
    """
    whole: Size = work.ofm if work.form != "reduction" else work.ifm
    rows, columns, depths = _sizes(whole, tile, target)
    h, w, d = np.meshgrid(rows, columns, depths, indexing="ij")
    buffers = target.buffers
    own = work.own_channel or work.form != "sums"
    window = target.mac_array.max_kernel or 2**16
    ih, iw = (
        fill((n - 1) * stride + (min(kernel, window) - 1) * apart + 1, granule)
        for n, stride, kernel, apart, granule in zip(
            (h, w), work.stride, work.kernel, work.dilation, tile, strict=False
        )
    )
    passes = min(work.ifm[2], step.pass_channels or step.channels)
    ic = d if own else np.full_like(d, fill(passes, buffers.input_channels))
    inputs = ih * iw * fill(ic, buffers.input_channels) * operands
    sums = h * w * fill(d, tile[2]) * _ACCUMULATOR_BYTES * accumulates
    fits = _fit(inputs, sums, target)
    fits = fits if fits.any() else inputs == inputs.min()
    if accumulates:
        cost = _reads(work, window, (h, w, d), (ih, iw), own)
        cost = np.where(math.prod(work.ifm) < 2 * ih * iw * ic, cost / 2, cost)  # the whole input stays
    else:
        cost = 1.0 / (h * w * d)
    order = np.lexsort((d.ravel(), -(h * w * d).ravel(), np.where(fits, cost, np.inf).ravel()))
    h, w, d, ih, iw, ic = (n.ravel()[order[:1]] for n in (h, w, d, ih, iw, ic))
    return _cut_to(work, step, tile, (int(h[0]), int(w[0]), int(d[0])), (int(ih[0]), int(iw[0]), int(ic[0])))


def _cut_to(work: Work, step: Step, tile: Size, outputs: Size, inputs: Size) -> Cut:
    whole = work.ofm if work.form != "reduction" else work.ifm
    return Cut(step, tile, outputs, inputs, _clip(outputs, whole), _clip(inputs, work.ifm))


def _sizes(whole: Size, tile: Size, target: Target) -> tuple[_Ints, _Ints, _Ints]:
    """Rows, columns and channels to choose from: multiples of the tile, of the channels in whole granules."""
    buffers, channels = target.buffers, whole[2]
    rows, columns = (
        np.arange(step, fill(min(size, most), step) + 1, step)
        for size, step, most in zip(whole[:2], tile[:2], buffers.max_block[:2], strict=True)
    )
    granule = buffers.block_channels
    if channels <= granule:
        return rows, columns, np.array([fill(channels, tile[2])])
    return rows, columns, np.arange(granule, fill(min(channels, buffers.max_block[2]), granule) + 1, granule)


def _fit(inputs: _Ints, sums: _Ints, target: Target) -> NDArray[np.bool_]:
    """Which blocks fit the buffers twice."""
    buffers = target.buffers
    granules = buffers.input_granule, buffers.accumulator_granule
    twice = [fill(2 * fill(n, buffers.bank_bytes), g) for n, g in zip((inputs, sums), granules, strict=True)]
    if buffers.shared_bytes is not None:
        return np.asarray(twice[0] + twice[1] <= buffers.shared_bytes)
    assert buffers.input_bytes is not None
    assert buffers.accumulator_bytes is not None
    return np.asarray((twice[0] <= buffers.input_bytes) & (twice[1] <= buffers.accumulator_bytes))


def _reads(work: Work, window: int, block: tuple[Any, Any, Any], area: tuple[Any, Any], own: bool) -> Any:
    """Elements of input and weights that are read for one output."""
    (H, W, C), (h, w, d) = work.ofm, block
    subkernels = pieces(work.kernel[0], window) * pieces(work.kernel[1], window)
    reads = area[0] * area[1] * work.ifm[2] * subkernels * (H / h) * (W / w) * (1 if own else -(-C // d))
    if work.form == "sums":
        if (H, W) == (1, 1):  # of a vector the weights are all, whatever the block
            return 1.0 / (h * w) + d * 1e-9
        reads = reads + work.taps * work.ifm[2] * -(-H // h) * -(-W // w) * (1 if own else C)
    return reads / math.prod(work.ofm)


def _clip(block: Size, whole: Size) -> Size:
    rows, columns, channels = map(min, block, whole)
    return rows, columns, channels
