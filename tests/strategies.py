"""Hypothesis strategies: Programs of one op, and short chains of ops, each with a batch of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests import case_ops as ops
from tests.case_builder import Builder, Case

KINDS: dict[str, Callable[[Builder], str]] = {
    "quantize": ops.quantize,
    "dequantize": lambda b: ops.dequantize(b, ops.image(b)),
    "conv": lambda b: ops.conv(b, ops.conv_input(b)),
    "linear": lambda b: ops.linear(b, ops.linear_input(b)),
    "add": lambda b: ops.add(b, ops.every_code(b)),
    "dense_sum": ops.dense_sum,
    "cat": lambda b: ops.cat(b, ops.every_code(b)),
    "clamp": lambda b: ops.clamp(b, ops.every_code(b)),
    "max_pool": lambda b: ops.max_pool(b, ops.every_code(b)),
    "avg_pool": lambda b: ops.avg_pool(b, ops.every_code(b)),
    "adaptive_avg_pool": lambda b: ops.adaptive_avg_pool(b, ops.every_code(b)),
    "reshape": lambda b: ops.reshape(b, ops.image(b)),
    "permute": lambda b: ops.permute(b, ops.image(b)),
}
ROUNDING_KINDS = ("conv", "linear", "add", "cat", "avg_pool", "adaptive_avg_pool")
SPATIAL = (ops.conv, ops.conv, ops.add, ops.cat, ops.clamp, ops.max_pool, ops.avg_pool, ops.adaptive_avg_pool)


@st.composite
def cases(draw: Callable[..., Any], kind: str) -> Case:
    """One op of ``kind``; an int32 accumulator is dequantized, as it is in every Program."""
    b = new_builder(draw, (1, 2, 3))
    return finish(b, KINDS[kind](b))


@st.composite
def chains(draw: Callable[..., Any], batches: tuple[int, ...] = (1, 2, 3)) -> Case:
    """Two to four spatial ops, flattened into a linear: ranges proven from one op serve the next."""
    b = new_builder(draw, batches)
    y = ops.image(b, 2)
    for make in draw(st.lists(st.sampled_from(SPATIAL), min_size=2, max_size=4)):
        if b.values[y].qtype.dtype != "int32":
            y = make(b, y)
    if b.values[y].qtype.dtype != "int32":
        y = ops.linear(b, ops.reshape(b, ops.permute(b, y)))
    return finish(b, y)


def new_builder(draw: Callable[..., Any], batches: tuple[int, ...]) -> Builder:
    seed = draw(st.integers(0, 2**32 - 1))
    return Builder(draw, draw(st.sampled_from(batches)), np.random.default_rng(seed))


def finish(b: Builder, y: str) -> Case:
    if b.values[y].qtype.dtype == "int32":
        return b.finish(y, ops.dequantize(b, y))
    return b.finish(y)
