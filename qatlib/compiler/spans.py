"""What units do and why they wait, as data: spans of cycles, and idle cycles by cause."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Unit = Literal["array", "vector", "table", "resize", "warp", "dma", "sram", "dram"]
Cause = Literal["compute", "sram", "dram", "weights", "table", "dependency", "launch"]
UNITS: tuple[Unit, ...] = ("array", "vector", "table", "resize", "warp", "dma", "sram", "dram")
"""``dma`` copies weights into the SRAM; ``sram`` and ``dram`` are their buses."""
CAUSES: tuple[Cause, ...] = ("compute", "sram", "dram", "weights", "table", "dependency", "launch")
"""Another unit, a memory, weights (decoder, scales, a slice that is not there), a table that is not loaded, another op,
the start of an op."""


@dataclass(frozen=True)
class Span:
    """``blocks`` pass a unit between cycles ``start`` and ``end``, of which it is ``busy``; on a bus with ``bytes``."""

    unit: Unit
    what: str
    start: float
    end: float
    busy: float
    blocks: int = 0
    bytes: float = 0.0


@dataclass(frozen=True)
class Sum:
    """Of the spans of one unit."""

    busy: float = 0.0
    blocks: int = 0
    bytes: float = 0.0


@dataclass
class Tracks:
    """Spans by unit, each in order and none over another, with their sums; and idle cycles by unit and cause."""

    spans: dict[Unit, list[Span]] = field(default_factory=dict)
    sums: dict[Unit, Sum] = field(default_factory=dict)
    stalls: dict[tuple[Unit, Cause], float] = field(default_factory=dict)

    def add(self, span: Span) -> None:
        """Append ``span``, or lengthen the one that ends where it begins."""
        track, total = self.spans.setdefault(span.unit, []), self.sums.get(span.unit, Sum())
        self.sums[span.unit] = _plus(total, span)
        last = track[-1] if track else None
        if last is None or (last.what, last.end) != (span.what, span.start):
            track.append(span)
            return
        both = _plus(Sum(last.busy, last.blocks, last.bytes), span)
        track[-1] = replace(last, end=span.end, busy=both.busy, blocks=both.blocks, bytes=both.bytes)

    def wait(self, unit: Unit, cause: Cause, cycles: float) -> None:
        if cycles > 0:
            self.stalls[unit, cause] = self.stalls.get((unit, cause), 0.0) + cycles


def _plus(total: Sum, span: Span) -> Sum:
    return Sum(total.busy + span.busy, total.blocks + span.blocks, total.bytes + span.bytes)
