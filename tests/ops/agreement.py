"""What an operator is held to, fake-quant against Program: section 5 of ``docs/numerics.md``."""

from __future__ import annotations

from torch import Tensor

from qatlib.analysis.agreement import MOST_SHARE, Gap, gaps
from qatlib.fake.model import FakeQuantModel
from qatlib.program import Program


def assert_agree(model: FakeQuantModel, program: Program, *inputs: Tensor, elements: int = 20_000) -> dict[str, Gap]:
    """Every op within 1 code on fewer than 0.1 % of its elements, of which there are at least ``elements``."""
    found = gaps(model, program, *inputs)
    for name, gap in found.items():
        assert gap.elements >= elements, f"{name} has {gap.elements} elements, too few to measure a share"
        assert gap.largest <= 1, f"{name} differs by {gap.largest} codes"
        assert gap.share < MOST_SHARE, f"{name} differs on {gap.share:.2%} of its elements"
    return found
