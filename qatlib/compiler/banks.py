"""The SRAM's banks, where each has a range of addresses: which of an op's streams meet in one, and for how long.

A stream is what an op reads of a map, writes of it, or copies and reads of weights. Maps are taken from their first
byte to their last, all at the same pace; what is taken several times while that goes on (weights, rows of a cascade,
the second factor of a product) evenly from all of its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from qatlib.compiler.target import Target

WEIGHTS = ""
"""Name of the stream of staged weights."""


@dataclass(frozen=True)
class Stretch:
    """Bytes of the SRAM; ``swept`` from the first to the last, or else evenly."""

    offset: int
    size: int
    swept: bool = True


Lay = tuple[tuple[str, tuple[Stretch, ...]], ...]
"""Where in the SRAM the streams of one op are, by the name of the map."""


def bank_cycles(target: Target, streams: Mapping[str, float], lay: Lay | None) -> float:
    """Cycles that the banks need for the bytes of ``streams``; 0 where banks have no addresses of their own.

    At each moment the bank with the most to do sets the pace. Without ``lay`` no two streams meet.
    """
    banks, size = target.sram.banks, target.sram.bank_bytes
    if banks is None or size is None:
        return 0.0
    if lay is None:
        return max(streams.values(), default=0.0) / banks.bytes_per_cycle
    places = dict(lay)
    moving: list[tuple[float, Stretch]] = []
    base = [0.0] * banks.count
    for name, amount in streams.items():
        spans = places.get(name, ())
        whole = sum(span.size for span in spans)
        for span in spans:
            part = amount * span.size / whole
            if span.swept:
                moving.append((part, span))
                continue
            for bank in range(span.offset // size, (span.offset + span.size - 1) // size + 1):
                inside = min(span.offset + span.size, (bank + 1) * size) - max(span.offset, bank * size)
                base[bank] += part * inside / span.size
    total = 0.0
    for low, high in pairwise(_edges((span for _, span in moving), size)):
        loads = base.copy()
        for part, span in moving:
            loads[int(span.offset + (low + high) / 2 * span.size) // size] += part
        total += (high - low) * max(loads) / banks.bytes_per_cycle
    return total


def _edges(spans: Iterable[Stretch], bank: int) -> list[float]:
    """Shares of the way at which a span goes on to another bank, with 0 and 1."""
    found = {0.0, 1.0}
    for span in spans:
        first = span.offset // bank + 1
        found |= {(at - span.offset) / span.size for at in range(first * bank, span.offset + span.size, bank)}
    return sorted(found)
