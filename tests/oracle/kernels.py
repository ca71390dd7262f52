"""Section 4 of ``docs/numerics.md``: which function computes which kind of Program op. Codes in and out are int64."""

from __future__ import annotations

from collections.abc import Callable

from . import dense, elementwise, movement, reduce, resample, table
from .integers import Ints

INTEGER_KINDS: dict[str, Callable[..., Ints]] = {
    "conv": dense.conv,
    "conv_transpose": dense.conv_transpose,
    "linear": dense.linear,
    "matmul": dense.matmul,
    "add": elementwise.add,
    "mul": elementwise.mul,
    "maximum": elementwise.maximum,
    "minimum": elementwise.minimum,
    "neg": elementwise.neg,
    "abs": elementwise.absolute,
    "clamp": elementwise.clamp,
    "compare": elementwise.compare,
    "logical": elementwise.logical,
    "where": elementwise.where,
    "cast": elementwise.cast,
    "prelu": elementwise.prelu,
    "table": table.table,
    "sum": reduce.total,
    "amax": reduce.amax,
    "amin": reduce.amin,
    "argmax": reduce.argmax,
    "argmin": reduce.argmin,
    "topk": reduce.topk,
    "max_pool": reduce.max_pool,
    "avg_pool": reduce.avg_pool,
    "adaptive_avg_pool": reduce.adaptive_avg_pool,
    "adaptive_max_pool": reduce.adaptive_max_pool,
    "constant": movement.constant,
    "cat": movement.cat,
    "reshape": movement.reshape,
    "permute": movement.permute,
    "slice": movement.slices,
    "take": movement.take,
    "gather": movement.gather,
    "expand": movement.expand,
    "pad": movement.pad,
    "embedding": movement.embedding,
    "resize_nearest": resample.resize_nearest,
    "resize_linear": resample.resize_linear,
    "grid_sample": resample.grid_sample,
}
