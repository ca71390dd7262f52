"""The parts of an accelerator that its timing depends on: strict schemas, each key explained in ``docs/targets.md``.

Cycles are the accelerator's, sizes are bytes. What is left out costs nothing or is not limited, as each class says.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from qatlib.ops.work import Operation

Cycles = Annotated[int, Field(ge=0, le=10**9)]
Rate = Annotated[float, Field(ge=1e-9, le=1e15, allow_inf_nan=False)]
"""Bounded so that the cycles of any work stay finite."""
Bytes = Annotated[int, Field(gt=0, le=2**40)]
Extent = Annotated[int, Field(gt=0, le=2**16)]
Extents = Annotated[tuple[Extent, Extent, Extent], Field(strict=False)]
Channel = Literal["weights", "scales", "maps", "stream", "dma", "write"]
"""Who uses a memory: decoder, fetch of scales, inputs of the array or of other work, copies of weights, results."""


Count = TypeVar("Count", int, NDArray[np.int64])


def pieces(n: Count, size: int) -> Count:
    """How many pieces of ``size`` hold ``n``."""
    return -(-n // size)


def fill(n: Count, granule: int) -> Count:
    """``n`` filled up to whole granules."""
    return pieces(n, granule) * granule


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Step(Strict):
    """Part of a sum that the array adds for every output of a tile at once: ``channels`` x ``taps`` in ``cycles``.

    One pass over a block takes ``pass_channels`` of the input (default ``channels``). With ``channels_per_cycle`` a
    step of fewer channels is shorter. Weights are stored filled up to whole ``stored_channels`` and ``stored_taps``
    (default those of a step). Where two orders of summing are compared, taps count in groups of ``group_taps`` (default
    ``taps``), a last group at least ``least_taps`` (default a whole one).
    """

    channels: Extent
    taps: Extent = 1
    cycles: Extent = 1
    pass_channels: Extent | None = None
    channels_per_cycle: Extent | None = None
    stored_channels: Extent | None = None
    stored_taps: Extent | None = None
    group_taps: Extent | None = None
    least_taps: Extent | None = None

    @property
    def channel_granule(self) -> int:
        """Channels in which weights are stored."""
        return self.stored_channels or self.channels

    def fills(self, channels: int, taps: int) -> float:
        """Share of the steps of a sum that are no filling, as far as the choice of an order sees it."""
        group = self.group_taps or self.taps
        whole, rest = taps // group * group, taps % group
        filled = whole + (max(rest, min(self.least_taps or group, group)) if rest else 0)
        return channels / fill(channels, self.channel_granule) * taps / filled


class Windows(Strict):
    """Pools, copies and functions of one map on the array: cycles of a tap of one tile; ``least_taps`` are paid."""

    cycles_per_tap: Rate
    least_taps: Extent = 1


class MacArray(Strict):
    """Outputs side by side (``tiles``: rows, columns, channels; the one with the least waste is taken) and their steps.

    ``own_channel_tiles`` serve depthwise convolutions and windows, ``row_tile`` outputs of one row. Without
    ``kernel_first`` every sum goes depth first, without ``own_channel`` a depthwise sum has one channel of a
    depth-first step, without ``windows`` pools are the vector unit's. ``int16`` is how many times as long a step of
    int16 takes, without which the array has no int16.
    """

    tiles: Annotated[tuple[Extents, ...], Field(min_length=1, strict=False)]
    own_channel_tiles: Annotated[tuple[Extents, ...] | None, Field(min_length=1, strict=False)] = None
    row_tile: Extents | None = None
    depth_first: Step
    kernel_first: Step | None = None
    own_channel: Step | None = None
    windows: Windows | None = None
    int16: Rate | None = None
    max_kernel: Extent | None = None
    lone_tile_cycles: Cycles = 0
    skips_padding: bool = False

    @property
    def peak(self) -> float:
        """Most multiply-accumulates of int8 in a cycle."""
        outputs = max(math.prod(tile) for tile in self.tiles)
        steps = [self.depth_first, *([self.kernel_first] if self.kernel_first else [])]
        return outputs * max(step.channels * step.taps / step.cycles for step in steps)

    def slowdown(self, dtype: str) -> float | None:
        """How many times as long as with int8 a step takes; None where the array cannot take ``dtype``."""
        return {"int8": 1.0, "int16": self.int16}.get(dtype)


class VectorRates(Strict):
    """Elements per cycle by the widest dtype that the work touches."""

    int8: Rate
    int16: Rate | None = None
    int32: Rate | None = None

    def of(self, dtype: str) -> float | None:
        return getattr(self, dtype, None)


class VectorUnit(Strict):
    """Work on single elements, alone or on what leaves the array; ``operations`` are slower than the rest.

    Without ``second_operand`` a map is added to a sum of products in a pass of its own.
    """

    elements_per_cycle: VectorRates
    operations: Annotated[dict[Operation, Rate], Field(strict=False)] = {}
    second_operand: bool = True


class Unit(Strict):
    """A unit of its own for resizing or warping; ``columns`` of the input's are held at a time."""

    elements_per_cycle: Rate
    columns: Extent | None = None


class Lookups(Strict):
    """Of one port in a cycle, by the dtype that is looked up: of 256 entries, or of segments (``docs/numerics.md``)."""

    int8: Rate
    int16: Rate | None = None


class TableUnit(Strict):
    """A unit of its own for tables: ``ports`` look up side by side, each in a copy of the table.

    A table comes from the DRAM before the first lookup, into all copies at once, at ``load_bytes_per_cycle`` (default
    what the DRAM gives), or the unit has all tables from before the inference. With ``beside_vector_unit`` an op of
    this unit and one of the vector unit run at once if neither needs the other.
    """

    lookups_per_cycle: Lookups
    ports: Extent = 1
    tables_from: Literal["dram", "unit"] = "dram"
    load_bytes_per_cycle: Rate | None = None
    beside_vector_unit: bool = False

    @model_validator(mode="after")
    def _loads_or_holds(self) -> Self:
        if self.tables_from == "unit" and self.load_bytes_per_cycle is not None:
            raise ValueError("tables_from is unit, which loads nothing; leave load_bytes_per_cycle out")
        return self

    def rate(self, dtype: str) -> float | None:
        """Lookups in a cycle; None where the unit has no tables for ``dtype``."""
        one = getattr(self.lookups_per_cycle, dtype, None)
        return None if one is None else one * self.ports


class Buffers(Strict):
    """Of the core, for two blocks: ``input_bytes`` and ``accumulator_bytes``, or ``shared_bytes`` cut into granules.

    A block of outputs has at most ``max_block`` rows, columns and channels, in whole ``block_channels``; one of inputs
    whole ``input_channels``; half a buffer whole banks. ``blocks_under_way`` overlap.
    """

    input_bytes: Bytes | None = None
    accumulator_bytes: Bytes | None = None
    shared_bytes: Bytes | None = None
    input_granule: Bytes = 1
    accumulator_granule: Bytes = 1
    bank_bytes: Bytes = 1
    max_block: Extents
    block_channels: Extent = 1
    input_channels: Extent = 1
    blocks_under_way: Extent = 2
    reads_while_writing: bool = True

    @model_validator(mode="after")
    def _apart_or_shared(self) -> Self:
        apart = (self.input_bytes is not None, self.accumulator_bytes is not None)
        if self.shared_bytes is None and not all(apart):
            raise ValueError("give input_bytes and accumulator_bytes, or shared_bytes for both")
        if self.shared_bytes is not None and any(apart):
            raise ValueError("give shared_bytes or input_bytes and accumulator_bytes, not both")
        if self.block_channels > self.max_block[2]:
            raise ValueError(
                f"block_channels is {self.block_channels}, max_block has only {self.max_block[2]} channels"
            )
        return self

    def hold(self, inputs: Count, sums: Count) -> Any:
        """Whether two blocks of ``inputs`` and of ``sums`` bytes fit; of arrays, which of them."""
        inputs = fill(2 * fill(inputs, self.bank_bytes), self.input_granule)
        sums = fill(2 * fill(sums, self.bank_bytes), self.accumulator_granule)
        if self.shared_bytes is not None:
            return inputs + sums <= self.shared_bytes
        assert self.input_bytes is not None
        assert self.accumulator_bytes is not None
        return (inputs <= self.input_bytes) & (sums <= self.accumulator_bytes)


class Weights(Strict):
    """``decoded_per_cycle`` weights leave the decoder.

    With ``compression`` weights are stored as :mod:`.codec` encodes them. Without, what is stored is assumed: at least
    ``decoded_per_step`` weights an output channel and step are decoded; those that only fill a step take ``padding`` of
    the bytes of others, counted at most as often as there are others, but at least ``padding_least`` of all others as
    long as that is not more than they would take as they are; ``header_bytes`` are those of a stream, and output
    channels are stored in groups of ``stored_outputs``.

    ``scale_bytes`` are those of an output channel's bias, multiplier and shift. With ``scale_fetch_bytes`` scales are
    fetched in such pieces, one after the other.
    """

    compression: bool = False
    decoded_per_cycle: Rate | None = None
    decoded_per_step: Extent = 1
    padding: Annotated[float, Field(ge=0, le=1)] = 0.0
    padding_least: Annotated[float, Field(ge=0, le=1)] = 0.0
    header_bytes: Cycles = 0
    stored_outputs: Extent = 1
    scale_bytes: Cycles = 12
    scale_fetch_bytes: Extent | None = None

    @model_validator(mode="after")
    def _measured_or_assumed(self) -> Self:
        keys = ("decoded_per_step", "padding", "padding_least", "header_bytes", "stored_outputs")
        assumed = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
        if self.compression and assumed:
            raise ValueError(f"compression is on, so that what is stored is known; leave out {', '.join(assumed)}")
        return self


class Memory(Strict):
    """``burst_bytes`` are moved even where fewer are asked for; at most so many bursts are under way (absent: any)."""

    burst_bytes: Extent = 1
    read_latency_cycles: Cycles = 0
    write_latency_cycles: Cycles = 0
    outstanding_reads: PositiveInt | None = None
    outstanding_writes: PositiveInt | None = None


class Banks(Strict):
    """Equal parts of a memory, each of which gives ``bytes_per_cycle`` to all that fall on it.

    Each has a range of addresses of its own or, with ``interleave_bytes``, so many bytes in turn.
    """

    count: Annotated[int, Field(ge=2, le=256)]
    bytes_per_cycle: Rate
    interleave_bytes: Extent | None = None


class Sram(Memory):
    """On-chip memory; ``alignment`` is in bytes and holds for the DRAM arena as well.

    ``holds_boundary`` says whether inputs and results of the network may live here.
    """

    bytes: Bytes
    bytes_per_cycle: Rate
    alignment: Annotated[int, Field(ge=4, le=4096)]
    holds_boundary: bool = True
    banks: Banks | None = None

    @property
    def bank_bytes(self) -> int | None:
        """Addresses of one bank; None if banks have none of their own."""
        return None if self.banks is None or self.banks.interleave_bytes else self.bytes // self.banks.count

    @model_validator(mode="after")
    def _whole_lines(self) -> Self:
        if self.alignment & (self.alignment - 1):
            raise ValueError(f"alignment is {self.alignment}; it must be a power of two")
        if self.bytes % self.alignment:
            raise ValueError(f"bytes is {self.bytes}; it must be a multiple of alignment ({self.alignment})")
        if self.burst_bytes > self.bytes:
            raise ValueError(f"burst_bytes is {self.burst_bytes}; it must not exceed bytes ({self.bytes})")
        if self.banks is not None:
            count, piece = self.banks.count, self.banks.interleave_bytes or self.alignment
            if self.bytes % (count * piece):
                what = "interleave_bytes" if self.banks.interleave_bytes else "alignment"
                raise ValueError(f"bytes is {self.bytes}, which is not {count} banks of whole {what} ({piece})")
        return self


class Dram(Memory):
    """Off-chip memory of any kind."""

    bytes_per_s: Rate


class InFlight(Strict):
    """Bytes that a read channel can have asked for and not yet got."""

    weights: Bytes
    scales: Bytes
    maps: Bytes
    stream: Bytes
    dma: Bytes
