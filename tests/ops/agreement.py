"""Fake-quant against the Program, op by op on the same integer inputs: section 5 of ``docs/numerics.md``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatlib.emulator import Emulator
from qatlib.fake.model import FakeQuantModel
from qatlib.program import Program

LARGEST_SHARE = 1e-3


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
    """The gap of every op that both worlds compute, each fed with the Program's own integers.

    An int32 accumulator is compared in units of ``s_x * s_w[c]``; there the fake-quant side is a float, so a difference
    counts from half a unit on.
    """
    emulator = Emulator(program)
    values = emulator.trace(*inputs)
    found: dict[str, Gap] = {}
    with torch.no_grad():
        for op in program:
            if op.name not in dict(model.ops()) or op.kind in ("dequantize", "float_op"):
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


def assert_agree(model: FakeQuantModel, program: Program, *inputs: Tensor, elements: int = 20_000) -> dict[str, Gap]:
    """Every op within 1 code on fewer than 0.1 % of its elements, of which there are at least ``elements``."""
    found = gaps(model, program, *inputs)
    for name, gap in found.items():
        assert gap.elements >= elements, f"{name} has {gap.elements} elements, too few to measure a share"
        assert gap.largest <= 1, f"{name} differs by {gap.largest} codes"
        assert gap.share < LARGEST_SHARE, f"{name} differs on {gap.share:.2%} of its elements"
    return found
