"""The value before rounding, against the oracle: for every op kind that rounds once, or picks what was rounded."""

from __future__ import annotations

import numpy as np
import pytest

from qatlib.golden import Golden
from qatlib.golden.recompute import unrounded
from qatlib.golden.rounding import RULES
from tests.golden.planting import again, floor, half_to_zero, half_up, truncate
from tests.kind_nets import NETS
from tests.oracle import half_away

KINDS = [
    *("conv", "conv_transpose", "linear", "matmul", "add", "cat", "mul", "sum", "avg_pool", "adaptive_avg_pool"),
    *("prelu", "maximum", "minimum", "where", "resize_linear", "quantize", "cast", "float_op"),
]
ORACLE = {
    "half away from zero": half_away,
    "half up": half_up,
    "half towards zero": half_to_zero,
    "floor (arithmetic shift)": floor,
    "towards zero (truncation)": truncate,
}


def _check(golden: Golden) -> set[str]:
    """Compare all ops of :data:`KINDS`; return the kinds seen."""
    seen = set()
    for entry in golden.entries:
        if entry.kind not in KINDS or entry.is_float:
            continue
        step = unrounded(golden, entry, golden.batch)
        if entry.kind == "cat" and "multiplier" not in golden.ops[entry.name].consts:
            continue
        assert step is not None, entry
        assert np.array_equal(step.codes(), golden.tensors[entry.name])
        if entry.kind not in ("quantize", "cast", "float_op"):
            for name, rule in ORACLE.items():
                assert np.array_equal(step.codes(RULES[name]), again(golden, entry.name, rule)), (entry, name)
        seen.add(entry.kind)
    return seen


def test_every_rule_of_every_kind(nets: dict[str, Golden], golden: Golden, island: Golden, wide: Golden) -> None:
    seen = set().union(*(_check(one) for one in (*nets.values(), golden, island, wide)))
    assert seen == set(KINDS)
    assert set(nets) == set(NETS)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_samples_than_the_golden_ones(nets: dict[str, Golden], count: int) -> None:
    golden = nets["merged with the batch"]
    step = unrounded(golden, golden.by_name["out"], count)
    assert step is not None
    assert np.array_equal(step.codes(), golden.samples("out", count))
    assert len(step.real) == 6 * count
