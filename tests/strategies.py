"""Hypothesis strategies: Programs of one op, and short chains of ops, each with a batch of inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests import case_elementwise, case_movement, case_reduce, case_resample, case_tables
from tests import case_ops as ops
from tests.case_builder import Builder, Case

KINDS: dict[str, Callable[[Builder], str]] = {
    "quantize": ops.quantize,
    "dequantize": lambda b: ops.dequantize(b, ops.image(b)),
    "conv": lambda b: ops.conv(b, ops.conv_input(b)),
    "linear": lambda b: ops.linear(b, ops.linear_input(b)),
    "dense_sum": ops.dense_sum,
    "cat": lambda b: ops.cat(b, ops.every_code(b)),
    "max_pool": lambda b: ops.max_pool(b, ops.every_code(b)),
    "avg_pool": lambda b: ops.avg_pool(b, ops.every_code(b)),
    "adaptive_avg_pool": lambda b: ops.adaptive_avg_pool(b, ops.every_code(b)),
    **case_elementwise.KINDS,
    **case_movement.KINDS,
    **case_reduce.KINDS,
    **case_resample.KINDS,
    **case_tables.KINDS,
}
"""One maker per kind of Program op; "extremum", "sign", "counts" and the like draw one of several kinds."""

ACCUMULATORS = ("conv", "conv_transpose", "linear")
ROUNDING_KINDS = (
    *("conv", "linear", "add", "cat", "avg_pool", "adaptive_avg_pool", "mul", "extremum", "prelu", "where"),
    *("sum", "matmul", "conv_transpose", "resize_linear", "table"),
)
SPATIAL = (
    *(ops.conv, ops.conv, ops.cat, ops.max_pool, ops.avg_pool, ops.adaptive_avg_pool, case_resample.conv_transpose),
    *(case_elementwise.add, case_elementwise.mul, case_elementwise.extremum, case_elementwise.sign),
    *(case_elementwise.clamp, case_elementwise.prelu, case_elementwise.where, case_tables.table),
    *(case_movement.cut, case_movement.take, case_movement.pad, case_resample.resize_nearest),
    *(case_resample.resize_linear, case_resample.adaptive_max_pool),
)
"""Makers that take and return an image of codes, or end in an accumulator."""


def cases(kind: str) -> SearchStrategy[Case]:
    """One op of ``kind``; an int32 accumulator is dequantized, as it is in every Program."""
    return seeds.map(lambda seed: case(kind, seed))


def chains(batches: tuple[int, ...] = (1, 2, 3)) -> SearchStrategy[Case]:
    """Two to four spatial ops, flattened into a linear: ranges proven from one op serve the next."""
    return seeds.map(lambda seed: chain(seed, batches))


seeds = st.integers(0, 2**63 - 1)
"""All that hypothesis draws: it never draws one twice, while examples made of many draws repeat most of each other."""


def case(kind: str, seed: int) -> Case:
    b = new_builder(seed, (1, 2, 3))
    return replace(finish(b, KINDS[kind](b)), seed=seed)


def chain(seed: int, batches: tuple[int, ...]) -> Case:
    b = new_builder(seed, batches)
    y = ops.image(b, 2)
    for _ in range(b.between(2, 4)):
        if b.values[y].qtype.dtype != "int32":
            y = b.pick(*SPATIAL)(b, y)
    if b.values[y].qtype.dtype != "int32":
        y = ops.linear(b, case_movement.reshape(b, case_movement.permute(b, y)))
    return replace(finish(b, y), seed=seed)


def new_builder(seed: int, batches: tuple[int, ...]) -> Builder:
    rng = np.random.default_rng(seed)
    return Builder(int(rng.choice(batches)), rng)


def finish(b: Builder, y: str) -> Case:
    if b.values[y].qtype.dtype == "int32" and b.ops[-1].kind in ACCUMULATORS:
        return b.finish(y, ops.dequantize(b, y))
    return b.finish(y)
