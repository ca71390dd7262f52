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
_MOST_BLOCKS = 1 << 20
"""Blocks that are compared; of more only those that cut evenly."""


@dataclass(frozen=True)
class Cut:
    """Blocks of outputs and of the inputs that they need: as buffers hold them, and not larger than the maps."""

    step: Step
    tile: Size
    ofm_block: Size
    ifm_block: Size
    ofm: Size
    ifm: Size


def cut_array(work: Work, target: Target, block: Size | None = None) -> Cut:
    """The cut of work for the array, into ``block`` of outputs if that is one of its :func:`blocks`."""
    return _cut(work, target, _Fit(work, target, operands=1, accumulates=True), block)


def cut_vector(work: Work, target: Target, operands: int, block: Size | None = None) -> Cut:
    """The cut of work for the vector unit, or for a unit of its own, which reads ``operands`` maps of equal size."""
    step = target.mac_array.depth_first
    unit = target.resize_unit
    if work.form == "resize" and unit is not None and unit.columns:
        (_, columns, channels), narrow = work.ofm, work.ifm[1]
        width = min(columns, max(1, unit.columns * columns // narrow))
        depth = min(channels, target.buffers.block_channels)
        return _cut_to(work, step, _VECTOR_TILE, (1, width, depth), (2, width, depth))
    return _cut(work, target, _Fit(work, target, operands, accumulates=False), block)


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


def blocks(work: Work, target: Target, count: int) -> tuple[Size, ...]:
    """Up to ``count`` blocks of outputs for the array that fit the buffers, those that read least first.

    Of blocks that cut the map into as many pieces along each axis only the first is named.
    """
    fit = _Fit(work, target, operands=1, accumulates=True)
    found: dict[Size, Size] = {}
    for at in fit.order[: int(fit.fits.sum())]:
        block = fit.block(at)
        rows, columns, channels = map(pieces, fit.whole, block)
        found.setdefault((rows, columns, channels), block)
        if len(found) == count:
            break
    return tuple(found.values())


class _Fit:
    """All blocks of whole tiles, and their order: those that fit, by what they read; of equal ones the largest.

    For work of the vector unit the largest block comes first. If none fits, the one with the smallest input does.
    """

    def __init__(self, work: Work, target: Target, operands: int, accumulates: bool) -> None:
        self.step = choose_step(work, target) if accumulates else target.mac_array.depth_first
        self.tile = choose_tile(work, target)
        self.whole: Size = work.ofm if work.form != "reduction" else work.ifm
        self.sizes = _sizes(self.whole, self.tile, target)
        h, w, d = np.meshgrid(*self.sizes, indexing="ij")
        buffers = target.buffers
        own = work.own_channel or work.form != "sums"
        window = target.mac_array.max_kernel or 2**16
        ih, iw = (
            fill((n - 1) * stride + (min(kernel, window) - 1) * apart + 1, granule)
            for n, stride, kernel, apart, granule in zip(
                (h, w), work.stride, work.kernel, work.dilation, self.tile, strict=False
            )
        )
        passes = min(work.ifm[2], self.step.pass_channels or self.step.channels)
        ic = d if own else np.full_like(d, fill(passes, buffers.input_channels))
        inputs = ih * iw * fill(ic, buffers.input_channels) * operands
        sums = h * w * fill(d, self.tile[2]) * _ACCUMULATOR_BYTES * accumulates
        fits = buffers.hold(inputs, sums)
        fits = fits if fits.any() else inputs == inputs.min()
        if accumulates:
            cost = _reads(work, window, (h, w, d), (ih, iw), own)
            cost = np.where(math.prod(work.ifm) < 2 * ih * iw * ic, cost / 2, cost)  # the whole input stays
        else:
            cost = 1.0 / (h * w * d)
        self.fits = fits.ravel()
        self.order = np.lexsort((d.ravel(), -(h * w * d).ravel(), np.where(fits, cost, np.inf).ravel()))
        self._outputs = tuple(n.ravel() for n in (h, w, d))
        self._inputs = tuple(n.ravel() for n in (ih, iw, ic))

    def block(self, at: int) -> Size:
        rows, columns, channels = (int(n[at]) for n in self._outputs)
        return rows, columns, channels

    def inputs(self, at: int) -> Size:
        rows, columns, channels = (int(n[at]) for n in self._inputs)
        return rows, columns, channels

    def find(self, block: Size) -> int:
        """Place of a block that fits; ValueError for another."""
        for at in np.flatnonzero(self.fits):
            if self.block(int(at)) == block:
                return int(at)
        raise ValueError(f"{'x'.join(map(str, block))} is no block that fits the buffers")


def _cut(work: Work, target: Target, fit: _Fit, block: Size | None) -> Cut:
    at = int(fit.order[0]) if block is None else fit.find(block)
    return _cut_to(work, fit.step, fit.tile, fit.block(at), fit.inputs(at))


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
        depths = np.array([fill(channels, tile[2])])
    else:
        depths = np.arange(granule, fill(min(channels, buffers.max_block[2]), granule) + 1, granule)
    if len(rows) * len(columns) * len(depths) > _MOST_BLOCKS:
        rows, columns, depths = _even(rows), _even(columns), _even(depths)
    return rows, columns, depths


def _even(sizes: _Ints) -> _Ints:
    """Of sizes 1, 2, 3 ... times a step, those that cut the largest into another number of pieces than larger ones."""
    counts = -(-len(sizes) // np.arange(1, len(sizes) + 1))
    return sizes[np.unique(counts, return_index=True)[1][::-1]]


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
