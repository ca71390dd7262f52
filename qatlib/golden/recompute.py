"""The value that an op rounds, recomputed from its golden inputs in NumPy. Section 4 of ``docs/numerics.md``.

Sums of weights times inputs come from the operator's own product in float64, which is exact; all else is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from qatlib.golden.rounding import Unrounded
from qatlib.golden.vectors import Array, Entry, Golden
from qatlib.integer import exact_kernels
from qatlib.ops.base import BY_KIND
from qatlib.ops.dense import Dense
from qatlib.ops.pool import windows
from qatlib.program import Op, Program
from qatlib.qtype import FLOAT, limits

SINGLE = 2.0**-22
"""Relative error of a float32 quotient, with a reciprocal in its place or not."""
ISLAND = 2.0**-18
"""Relative error that float32 kernels of two runtimes may differ by."""


def unrounded(golden: Golden, entry: Entry, samples: int) -> Unrounded | None:
    """What ``entry`` is rounded from for the first ``samples``; None where it is not known.

    It is known if it gives the golden codes by the contract's own rule.
    """
    op = golden.ops.get(entry.name)
    if op is None or entry.is_float:
        return None
    build = _BUILDERS.get(op.kind) or (_dense if isinstance(BY_KIND[op.kind], Dense) else None)
    if build is None:
        return None
    step = build(golden.program, op, [golden.samples(name, samples) for name in op.inputs])
    return step if np.array_equal(step.codes(), golden.samples(entry.name, samples)) else None


def _limits(program: Program, op: Op) -> tuple[int, int]:
    lo, hi = limits(program.values[op.output].qtype.dtype)
    return int(op.attrs.get("lo", lo)), int(op.attrs.get("hi", hi))


def _constant(program: Program, op: Op, role: str, default: int = 0) -> Array:
    """Constant ``role`` as float64; ``[default]`` where the op has none."""
    return program.constant(op, role).double().numpy() if role in op.consts else np.full(1, float(default))


def _factors(program: Program, op: Op, role: str = "multiplier") -> Array:
    return np.ldexp(_constant(program, op, role, 1), -_constant(program, op, "shift").astype(np.int32))


# -- sums --------------------------------------------------------------------------------------------------------------


def _dense(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    operator = BY_KIND[op.kind]
    assert isinstance(operator, Dense)
    x, *addend = (torch.from_numpy(array.astype(np.float64)) for array in inputs)
    with exact_kernels():
        weight, bias = (program.constant(op, role).double() for role in ("weight", "bias"))
        acc = operator.product(op)(x, weight, bias)
        over = [operator.over_channels(torch.from_numpy(_factors(program, op, role)), acc.dim()).numpy()
                for role in ("multiplier", "addend_multiplier")[: len(inputs)]]  # fmt: skip
        added = operator.over_channels(bias, acc.dim()).numpy()
    names = ("the sum of products", "the addend")[: len(inputs)]
    terms = (acc.numpy(), *(array.numpy() for array in addend))
    return Unrounded(terms, tuple(over), *_limits(program, op), names, added, sums=True)


def _summed(total: Callable[[Op, Program, list[Array]], Array]) -> Callable[[Program, Op, list[Array]], Unrounded]:
    """An op that requantizes one sum, ``total`` of its inputs."""

    def build(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
        acc = total(op, program, [x.astype(np.float64) for x in inputs])
        return Unrounded((acc,), (_factors(program, op),), *_limits(program, op), sums=True)

    return build


def _sum(op: Op, program: Program, inputs: list[Array]) -> Array:
    return np.asarray(inputs[0].sum(tuple(op.attrs["axes"]), keepdims=bool(op.attrs["keepdim"])))


def _matmul(op: Op, program: Program, inputs: list[Array]) -> Array:
    a, b = (np.rint(np.ldexp(x, -bits)) for x, bits in zip(inputs, op.attrs["drop"], strict=True))
    return np.asarray(a @ b)


def _windows(op: Op, program: Program, inputs: list[Array]) -> Array:
    x = np.pad(inputs[0], [(0, 0), (0, 0), *op.attrs["padding"]])
    kernel, steps = op.attrs["kernel"], (slice(None, None, step) for step in op.attrs["stride"])
    axes = tuple(range(2, x.ndim))
    seen = np.lib.stride_tricks.sliding_window_view(x, kernel, axes)[(slice(None), slice(None), *steps)]
    return np.asarray(seen.sum(tuple(range(-len(kernel), 0))))


def _adaptive(op: Op, program: Program, inputs: list[Array]) -> Array:
    (x,) = inputs
    for axis, (size, out) in enumerate(zip(x.shape[2:], op.attrs["output_size"], strict=True), start=2):
        parts = [x.take(range(*window), axis).sum(axis, keepdims=True) for window in windows(size, out)]
        x = np.concatenate(parts, axis)
    return x


# -- terms -------------------------------------------------------------------------------------------------------------


def _add(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    axes = max(x.ndim for x in inputs)
    terms = tuple(x.astype(np.float64).reshape((1,) * (axes - x.ndim) + x.shape) for x in inputs)
    factors = tuple(_factors(program, op)[i : i + 1] for i in range(2))
    return Unrounded(terms, factors, *_limits(program, op), ("the first operand", "the second operand"))


def _cat(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    axis, rank = op.attrs["axis"], inputs[0].ndim
    factors = np.broadcast_to(_factors(program, op), len(inputs)).repeat([x.shape[axis] for x in inputs])
    joined = np.concatenate(inputs, axis).astype(np.float64)
    shape = [-1 if i == axis else 1 for i in range(rank)]
    return Unrounded((joined,), (factors.reshape(shape),), *_limits(program, op))


def _prelu(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    shape = (-1, *[1] * (inputs[0].ndim - 2))
    up, down = (_factors(program, op, role).reshape(shape) for role in ("multiplier", "negative_multiplier"))
    x = inputs[0].astype(np.float64)
    return _value(program, op, np.where(x >= 0, x * up, x * down))


def _value(program: Program, op: Op, real: Array) -> Unrounded:
    return Unrounded((real,), (np.ones(1),), *_limits(program, op))


def _branches(program: Program, op: Op, inputs: list[Array]) -> list[Array]:
    """Terms that are rounded one by one. Rules and clamp are monotonous: one may choose among them before."""
    factors = np.broadcast_to(_factors(program, op), len(inputs))
    return [x.astype(np.float64) * factor for x, factor in zip(inputs, factors, strict=True)]


def _maximum(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    return _value(program, op, np.maximum(*_branches(program, op, inputs)))


def _minimum(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    return _value(program, op, np.minimum(*_branches(program, op, inputs)))


def _where(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    rest = iter(_branches(program, op, inputs[1:]))
    sides = [next(rest) if op.attrs[side] is None else float(op.attrs[side]) for side in ("true", "false")]
    return _value(program, op, np.where(inputs[0] != 0, *sides))


def _resize(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    x = inputs[0].astype(np.float64)
    for axis in range(2, x.ndim):
        x = np.moveaxis(np.tensordot(x, _constant(program, op, f"weight{axis - 2}"), (axis, 1)), -1, axis)
    return _value(program, op, np.ldexp(x, -op.attrs["bits"] * (x.ndim - 2)))


# -- float32 quotients -------------------------------------------------------------------------------------------------


def _quotient(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    """Section 2: of real numbers, or of integers that become codes."""
    scale = program.values[op.output].qtype.scale
    if scale is None:
        return _value(program, op, inputs[0].astype(np.float64))
    x, unit = inputs[0].astype(np.float32), np.float32(scale)
    others = {"product with the float32 reciprocal of the scale": x * (np.float32(1) / unit)}
    return replace(_value(program, op, (x / unit).astype(np.float64)), inexact=SINGLE, others=others)


def _island(program: Program, op: Op, inputs: list[Array]) -> Unrounded:
    """The operator in float32, as torch computes it here."""
    value = program.values[op.output]
    bare = replace(program, values={**program.values, op.output: replace(value, qtype=FLOAT)})
    ranges = [program.values[name].qtype.limits if x.dtype.kind == "i" else (0, 0)
              for name, x in zip(op.inputs, inputs, strict=True)]  # fmt: skip
    with exact_kernels():
        real = BY_KIND[op.kind].kernel(op, bare, ranges)(*(torch.tensor(x).float() for x in inputs)).numpy()
    scale = np.float32(1.0 if value.qtype.scale is None else value.qtype.scale)
    return replace(_value(program, op, (real / scale).astype(np.float64)), inexact=ISLAND)


_BUILDERS: dict[str, Callable[[Program, Op, list[Array]], Unrounded]] = {
    "add": _add,
    "cat": _cat,
    "mul": _summed(lambda op, program, inputs: inputs[0] * inputs[1]),
    "sum": _summed(_sum),
    "matmul": _summed(_matmul),
    "avg_pool": _summed(_windows),
    "adaptive_avg_pool": _summed(_adaptive),
    "prelu": _prelu,
    "maximum": _maximum,
    "minimum": _minimum,
    "where": _where,
    "resize_linear": _resize,
    "quantize": _quotient,
    "cast": _quotient,
    "float_op": _island,
}
