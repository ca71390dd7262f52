"""What Vela says of every layer, buffer and network: rows of the tables beside this file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

LAYERS, BUFFERS, TOTALS = (Path(__file__).with_name(f"{name}.csv") for name in ("reference", "buffers", "totals"))


@dataclass(frozen=True)
class Layer:
    """One operation of the accelerator with what is fused into it. Shapes are ``HxWxC``, kernels ``HxW``.

    ``cycles`` is the largest of ``npu_cycles``, ``sram_cycles`` and ``off_cycles``; ``npu_cycles`` contains what is
    waited for weights. Bytes are those that cross the bus, bursts filled up; ``weight_bytes`` are the compressed
    weights of the whole layer. ``reads`` are the layers (by ``place``) that it reads, -1 the input of the network;
    ``writes`` is the buffer, which several layers can fill.
    ``ofm`` is before a transpose that is fused; ``ofm_tile`` are the outputs side by side in the array, where Vela says
    them. ``ifm_at`` is memory and layout, as ``sram:NHCWB16``.
    """

    network: str
    config: str
    place: int
    name: str
    kind: str
    fused: str
    reads: str
    writes: int
    ifm: str
    ifm2: str
    ofm: str
    kernel: str
    stride: str
    ifm_type: str
    ofm_type: str
    ifm_at: str
    ifm2_at: str
    ofm_at: str
    weights: int
    weight_bytes: int
    depth_slices: int
    buffering: str
    stripe_rows: int
    cascade: int
    ifm_block: str
    ofm_block: str
    ofm_tile: str
    traversal: str
    macs: int
    cycles: int
    npu_cycles: int
    mac_cycles: int
    output_cycles: int
    sram_cycles: int
    off_cycles: int
    sram_read: int
    sram_write: int
    off_read: int
    off_write: int
    sram_in_use: int


@dataclass(frozen=True)
class Buffer:
    """One place in the memory plan: ``first`` and ``last`` are steps, two a layer; bytes and address."""

    network: str
    config: str
    number: int
    memory: str
    use: str
    first: int
    last: int
    address: int
    size: int
    layout: str


@dataclass(frozen=True)
class Total:
    """One network: cycles, peak of the SRAM, what the off-chip memory holds and what crosses its bus, in bytes."""

    network: str
    config: str
    cycles: int
    macs: int
    sram_peak: int
    off_chip_size: int
    off_chip_traffic: int
    weights: int
    encoded_weights: int


def read_rows(path: Path, kind: type[Any]) -> list[Any]:
    """The rows of a committed table."""
    types = {field.name: field.type for field in fields(kind)}
    with path.open(newline="") as file:
        return [
            kind(**{key: int(text) if types[key] == "int" else text for key, text in row.items()})
            for row in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write a table: one column a field."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
