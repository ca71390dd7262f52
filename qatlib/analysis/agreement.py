"""Fake-quant against the Program, op by op on the same integer inputs: section 5 of ``docs/numerics.md``.

For a model of your own, with inputs as it takes them::

    rows = gap_table(model, to_program(model), *inputs)
    write_gap_table(rows, "lsb.csv")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from qatlib.atomic import csv_text, write_text
from qatlib.emulator import Emulator
from qatlib.fake.model import FakeQuantModel
from qatlib.program import Program

MOST_SHARE = 1e-3
"""Share of elements that may differ by one code."""
MOST_SHARE_INT16 = 2.0**-5
"""The same of 16-bit outputs: 2^(15 - b) with multipliers of b = 20 bits, whose rounding moves 256 times more codes."""
MOST_SHARE_OF_SAMPLERS = 2.0**-3
"""The same of interpolation: up to one result in four is an exact tie (a map halved), and float32 rounds up to half of
those the other way."""
SAMPLERS = frozenset({"grid_sample", "resize_linear"})

_TIME = re.compile(r"(\.t|\.out\.)\d+(?=\.|$)")
"""The time step in the name of an unrolled recurrent step, or of its part of the joined output."""


def most_share(kind: str, dtype: str) -> float:
    """Share of the elements of an op that may differ by one code; tables of 16-bit codes have their own bound."""
    if kind in SAMPLERS:
        return MOST_SHARE_OF_SAMPLERS
    return MOST_SHARE_INT16 if dtype == "int16" else MOST_SHARE


@dataclass(frozen=True)
class Gap:
    """Of one op: number of elements, how many codes differ, and by how much at most (in codes)."""

    elements: int
    differing: int
    largest: float

    @property
    def share(self) -> float:
        return self.differing / self.elements


def gaps(model: FakeQuantModel, program: Program, *inputs: Tensor) -> dict[str, Gap]:
    """The gap of every op that both worlds compute, each fed with the Program's own integers, in execution order.

    An int32 accumulator is compared in units of ``s_x * s_w[c]``; there the fake-quant side is a float, so a difference
    counts from half a unit on.
    """
    emulator = Emulator(program)
    values, computed = emulator.trace(*inputs), dict(model.ops())
    found: dict[str, Gap] = {}
    with torch.no_grad():
        for op in program:
            if op.name not in computed or op.kind in ("dequantize", "float_op"):
                continue
            reals = [emulator.real(name, emulator.widen(name, values[name])) for name in op.inputs]
            fake = model.compute(op.name, *reals)
            integer = values[op.output]
            if integer.dtype == torch.int32:
                reader = next(other for other in program if other.kind == "dequantize" and op.output in other.inputs)
                apart = (fake.double() / program.constant(reader, "scale").double() - integer).abs()
                differs = apart > 0.5
            else:
                apart = (emulator.codes(op.output, fake) - integer).abs()
                differs = apart > 0
            found[op.name] = Gap(apart.numel(), int(differs.sum()), float(apart.max()))
    return found


@dataclass(frozen=True)
class GapRow:
    """One op, or the ops that differ only in the time step, which is ``*`` in their name.

    ``stored_lsb`` is the largest error that the tables among them state, in codes; ``largest_lsb`` the largest seen
    difference in codes, of an int32 output in units of its accumulator.
    """

    name: str
    kind: str
    dtype: str
    ops: int
    elements: int
    differing: int
    largest_lsb: float
    stored_lsb: float | None

    @property
    def share(self) -> float:
        return self.differing / self.elements


def gap_table(model: FakeQuantModel, program: Program, *inputs: Tensor) -> list[GapRow]:
    """One row per op, in execution order of the first; time steps of a recurrent layer together."""
    ops, merged = {op.name: op for op in program}, dict[tuple[str, str, str], GapRow]()
    for name, gap in gaps(model, program, *inputs).items():
        op = ops[name]
        stored = op.attrs["table"]["worst_lsb"] if op.kind == "table" else None
        row = GapRow(
            _TIME.sub(r"\1*", name), op.kind, program.values[op.output].qtype.dtype,
            1, gap.elements, gap.differing, gap.largest, stored,
        )  # fmt: skip
        key = (row.name, row.kind, row.dtype)
        merged[key] = _sum(merged[key], row) if key in merged else row
    return list(merged.values())


def write_gap_table(rows: Sequence[GapRow], path: str | Path) -> str:
    """Write the rows as CSV, whole or not at all, and return the text; numbers have 6 significant digits."""
    text = csv_text([*(field.name for field in fields(GapRow)), "share"], ((*astuple(row), row.share) for row in rows))
    write_text(path, text)
    return text


def _sum(a: GapRow, b: GapRow) -> GapRow:
    stored = [x for x in (a.stored_lsb, b.stored_lsb) if x is not None]
    return GapRow(
        a.name, a.kind, a.dtype, a.ops + b.ops, a.elements + b.elements, a.differing + b.differing,
        max(a.largest_lsb, b.largest_lsb), max(stored, default=None),
    )  # fmt: skip
