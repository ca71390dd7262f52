"""Running a Program in NumPy, and the two steps between float and integer: section 2 of ``docs/numerics.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qatlib.program import Op, Program
from qatlib.qtype import QType

from .integers import Rounding, half_even
from .kernels import INTEGER_KINDS
from .task import Task

Array = NDArray[Any]


def run(program: Program, *inputs: Array, rounding: Rounding = half_even) -> dict[str, Array]:
    """Every value of ``program`` by name, inputs included, in its own dtype; kinds: all but ``float_op``.

    Raises ValueError if a result does not fit the format of its value or contradicts its shape.
    """
    batch = _batch(program, inputs)
    known = {name: _checked(program, name, x, batch) for name, x in zip(program.inputs, inputs, strict=True)}
    for op in program.ops:
        result = _evaluate(program, op, [known[name] for name in op.inputs], rounding)
        known[op.output] = _checked(program, op.output, result, batch)
    return known


def quantize(x: NDArray[np.float32], qtype: QType) -> Array:
    """``clamp(rne(x / s))`` with a float32 division; raises ValueError for NaN."""
    if np.isnan(x).any():
        raise ValueError(f"{int(np.isnan(x).sum())} elements are NaN")
    with np.errstate(over="ignore", under="ignore"):
        quotient = x.astype(np.float32) / np.float32(qtype.scale)
    return np.clip(np.rint(quotient.astype(np.float64)), *qtype.limits).astype(np.int64)


def dequantize(q: Array, qtype: QType, scale: Array | None) -> NDArray[np.float32]:
    """``fl32(q * s)``; for an int32 accumulator ``fl32(acc * S)`` with the product in float64."""
    if qtype.dtype == "int32":
        if scale is None:
            raise ValueError("an int32 accumulator needs its scale constant")
        return (q.astype(np.float64) * scale.astype(np.float64)).astype(np.float32)
    return np.multiply(q.astype(np.float32), np.float32(qtype.scale), dtype=np.float32)


def _evaluate(program: Program, op: Op, inputs: list[Array], rounding: Rounding) -> Array:
    if op.kind == "quantize":
        return quantize(inputs[0], program.values[op.output].qtype)
    if op.kind == "dequantize":
        scale = program.constant(op, "scale").numpy() if "scale" in op.consts else None
        return dequantize(inputs[0], program.values[op.inputs[0]].qtype, scale)
    consts = {role: program.constants[key].numpy().astype(np.int64) for role, key in op.consts.items()}
    qtype = program.values[op.output].qtype
    task = Task(op.attrs, consts, qtype.limits, qtype.scale, rounding)
    return INTEGER_KINDS[op.kind](task, *(x.astype(np.int64) for x in inputs))


def _checked(program: Program, name: str, x: Array, batch: int) -> Array:
    """``x`` in the dtype of value ``name``, after a look at its shape and range."""
    value = program.values[name]
    shape: Iterable[int] = (-size * batch if size < 0 else size for size in value.shape)
    if x.shape != tuple(shape):
        raise ValueError(f"{name} has shape {x.shape}; the Program says {value.shape}")
    if value.qtype.is_float:
        return x.astype(np.float32)
    low, high = value.qtype.limits
    if x.size and (x.min() < low or x.max() > high):
        raise ValueError(f"{name} has codes {x.min()}..{x.max()}, outside {value.qtype.dtype}")
    return x.astype(value.qtype.dtype)


def _batch(program: Program, inputs: Sequence[Array]) -> int:
    """The batch size, which a size of -k in the shape of an input is k times."""
    for name, x in zip(program.inputs, inputs, strict=True):
        for want, got in zip(program.values[name].shape, x.shape, strict=True):
            if want < 0:
                return int(got) // -want
    raise ValueError("no input has a batch axis")
