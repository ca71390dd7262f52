"""Makers of tables: random ones, with every division and symmetry that the contract allows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from qatlib.qtype import limits
from tests.case_builder import Array, Builder, int32
from tests.case_ops import every_code


def table(b: Builder, x: str) -> str:
    return table8(b, x) if b.values[x].qtype.dtype == "int8" else table16(b, x)


def table8(b: Builder, x: str) -> str:
    """256 entries of int8 or int16."""
    output = b.qtype()
    low, high = sorted(b.rng.integers(output.limits[0], output.limits[1] + 1, 2).tolist())
    entries = b.rng.integers(low, high + 1, 256)
    about = {"division": "exact", "segments": 1, "entries": 256, "codes": [-128, 127], "symmetry": "none"}
    attrs = {"function": "tanh", "table": {**about, "extra_bits": 0, "range": None, "worst_lsb": 0.5, "mean_lsb": 0.25}}
    bounds = {"lo": int(entries.min()), "hi": int(entries.max())}
    consts = {"table": torch.from_numpy(entries.astype(output.dtype))}
    return b.emit("table", [x], b.values[x].shape, output, {**attrs, **bounds}, **consts)


def table16(b: Builder, x: str) -> str:
    """Segments of random lengths, steps and entries; the input's codes may reach beyond the first and the last."""
    output, symmetry = b.qtype(), b.pick("none", "odd", "even")
    top = 32767 if symmetry == "none" else 32768
    first, last = (-32768, top) if symmetry == "none" else (0, top)
    if b.pick(True, False):
        first, last = sorted(b.rng.choice(np.arange(first, last + 1), 2, replace=False).tolist())
    start, step, offset, entries = segments(b, first, last)
    extra = int(b.rng.integers(0, 16))
    about = {"division": "curvature", "segments": len(start), "entries": len(entries), "codes": [first, last]}
    attrs = {
        "function": "tanh",
        "table": {**about, "symmetry": symmetry, "extra_bits": extra, "range": None, "worst_lsb": 1.0, "mean_lsb": 0.3},
        **b.limits(output),
    }
    consts = {"start": int32(start), "step": int32(step), "offset": int32(offset)}
    stored = torch.from_numpy(entries.astype(np.int16))
    return b.emit("table", [x], b.values[x].shape, output, attrs, table=stored, **consts)


def segments(b: Builder, first: int, last: int) -> tuple[list[int], list[int], list[int], Array]:
    """First codes, steps and offsets of 1 to 8 segments, and all their entries."""
    inner = b.rng.choice(np.arange(first + 1, last + 1), min(int(b.rng.integers(0, 8)), last - first), replace=False)
    start = sorted({first, *inner.tolist()})
    step, offset, entries = [], [], 0
    for low, high in zip(start, [*(s - 1 for s in start[1:]), last], strict=True):
        smallest = max(0, int(high - low).bit_length() - 9)
        step.append(int(b.rng.integers(smallest, 16)))
        offset.append(entries)
        entries += -(-(high - low) // 2 ** step[-1]) + 1
    style = b.pick("any", "extreme", "smooth")
    low, high = limits("int16")
    if style == "any":
        return start, step, offset, b.rng.integers(low, high + 1, entries)
    if style == "extreme":
        return start, step, offset, b.rng.choice([low, high], entries)
    return start, step, offset, np.clip(np.cumsum(b.rng.integers(-200, 201, entries)), low, high)


KINDS: dict[str, Callable[[Builder], str]] = {"table": lambda b: table(b, every_code(b))}
