"""Recomputing one op from its golden inputs with another rounding, clamp or operand.

The sum before requantization is ``sum(term_i * M_i) / 2^n`` (sections 3 and 4 of ``docs/numerics.md``). The terms come
from the operator's own exact kernel, the rest is integer arithmetic in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qatlib.golden.vectors import Array, Entry, Golden
from qatlib.integer import INT32, exact_kernels
from qatlib.ops.base import BY_KIND
from qatlib.ops.dense import Dense
from qatlib.program import Op, Program
from qatlib.qtype import limits

Rule = Callable[[Array, Array], Array]
"""``(numerator, shift) -> integers``: numerator / 2^shift, rounded; both int64."""


def _split(numerator: Array, shift: Array) -> tuple[Array, Array, Array]:
    """Floor quotient, rest in [0, 2^shift), and half of 2^shift (0 for shift 0)."""
    floor = numerator >> shift
    return floor, numerator - (floor << shift), np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)


def half_to_even(numerator: Array, shift: Array) -> Array:
    """The rule of the contract."""
    floor, rest, half = _split(numerator, shift)
    return np.asarray(floor + ((rest > half) | ((rest == half) & (floor % 2 == 1) & (half > 0))))


def half_up(numerator: Array, shift: Array) -> Array:
    """``(numerator + 2^(n-1)) >> n``: halves go towards plus infinity."""
    floor, rest, half = _split(numerator, shift)
    return np.asarray(floor + ((rest >= half) & (half > 0)))


def half_away(numerator: Array, shift: Array) -> Array:
    """C's ``round``: halves go away from zero."""
    return np.asarray(np.sign(numerator) * half_up(np.abs(numerator), shift))


def half_to_zero(numerator: Array, shift: Array) -> Array:
    """Halves go towards zero."""
    floor, rest, half = _split(np.abs(numerator), shift)
    return np.asarray(np.sign(numerator) * (floor + (rest > half)))


def floor(numerator: Array, shift: Array) -> Array:
    """An arithmetic right shift."""
    return np.asarray(numerator >> shift)


def toward_zero(numerator: Array, shift: Array) -> Array:
    """C's integer division."""
    return np.asarray(np.sign(numerator) * (np.abs(numerator) >> shift))


RULES: dict[str, Rule] = {
    "half away from zero": half_away,
    "half up": half_up,
    "half towards zero": half_to_zero,
    "floor (arithmetic shift)": floor,
    "towards zero (truncation)": toward_zero,
}


@dataclass(frozen=True)
class Requantization:
    """``clamp(rne(sum(term * multiplier) / 2^shift), lo, hi)`` of one op, before any of it is done.

    Arrays broadcast against the output. ``names`` says what each term is; ``bias`` is in units of the first term.
    """

    terms: tuple[Array, ...]
    multipliers: tuple[Array, ...]
    shift: Array
    lo: int
    hi: int
    dtype: str
    names: tuple[str, ...]
    bias: Array | None = None

    @property
    def numerator(self) -> Array:
        return np.asarray(sum(term * m for term, m in zip(self.terms, self.multipliers, strict=True)))

    def real(self) -> Array:
        """The value before rounding, in output codes; float64."""
        return np.ldexp(self.numerator.astype(np.float64), -self.shift.astype(np.int32))

    def without(self, index: int) -> Requantization:
        """The same with one term left out."""
        keep = [i for i in range(len(self.terms)) if i != index]
        pick = tuple(self.terms[i] for i in keep), tuple(self.multipliers[i] for i in keep)
        return replace(self, terms=pick[0], multipliers=pick[1], bias=None if index == 0 else self.bias)

    def without_bias(self) -> Requantization:
        assert self.bias is not None
        return replace(self, terms=(self.terms[0] - self.bias, *self.terms[1:]), bias=None)

    def codes(self, rule: Rule = half_to_even) -> Array:
        """Output codes."""
        return np.asarray(np.clip(self.unclamped(rule), self.lo, self.hi))

    def unclamped(self, rule: Rule = half_to_even) -> Array:
        return rule(self.numerator, self.shift)

    def single_precision(self) -> Array:
        """Output codes of a device that multiplies by a float32 factor and rounds the float32 product."""
        factors = (np.ldexp(m.astype(np.float64), -self.shift.astype(np.int32)) for m in self.multipliers)
        total = sum(t.astype(np.float32) * f.astype(np.float32) for t, f in zip(self.terms, factors, strict=True))
        return np.asarray(np.clip(np.rint(total), self.lo, self.hi).astype(np.int64))

    def at_ties(self) -> Array:
        """Where the value before rounding lies exactly between two codes."""
        _, rest, half = _split(self.numerator, self.shift)
        return np.asarray((rest == half) & (half > 0))


def requantization(golden: Golden, entry: Entry, samples: int) -> Requantization | None:
    """The requantization that makes the first ``samples`` of ``entry``, or None where it is not known.

    It is known if it gives the golden codes by the contract's own rule.
    """
    op = golden.ops.get(entry.name)
    if op is None or "multiplier" not in op.consts or entry.dtype not in ("int8", "int16"):
        return None
    inputs = [golden.samples(name, samples) for name in op.inputs]
    build = _BUILDERS.get(op.kind) or (_dense if isinstance(BY_KIND[op.kind], Dense) else None)
    step = None if build is None else build(golden.program, op, inputs)
    same = step is not None and np.array_equal(step.codes(), golden.samples(entry.name, samples))
    return step if same else None


def _made(
    program: Program, op: Op, terms: list[Array], multipliers: list[Array], shift: Array, names: list[str],
    bias: Array | None = None,
) -> Requantization:  # fmt: skip
    wide = [np.asarray(x).astype(np.int64) for x in (*terms, *multipliers)]
    count = len(terms)
    dtype = program.values[op.output].qtype.dtype
    return Requantization(
        tuple(wide[:count]),
        tuple(wide[count:]),
        np.asarray(shift).astype(np.int64),
        int(op.attrs["lo"]),
        int(op.attrs["hi"]),
        dtype,
        tuple(names),
        bias,
    )


def _constant(program: Program, op: Op, role: str) -> Array:
    return np.asarray(program.constant(op, role).numpy())


def _run(program: Program, op: Op, inputs: list[Array]) -> Array:
    """The operator's kernel on golden codes; the result as float64 integers."""
    ranges = [program.values[name].qtype.limits for name in op.inputs[: len(inputs)]]
    with exact_kernels():
        out = BY_KIND[op.kind].kernel(op, program, ranges)(*(torch.from_numpy(x.astype(np.float64)) for x in inputs))
        return np.asarray(out.double().numpy())


def _dense(program: Program, op: Op, inputs: list[Array]) -> Requantization:
    """Accumulators of the same op without its output stage."""
    operator = BY_KIND[op.kind]
    assert isinstance(operator, Dense)
    bare = replace(op, inputs=op.inputs[:1], consts={role: op.consts[role] for role in ("weight", "bias")})
    acc = _run(program, bare, inputs[:1])

    def shaped(role: str) -> Array:
        return np.asarray(operator.over_channels(program.constant(op, role), acc.ndim).numpy())

    roles = ["multiplier", "addend_multiplier"][: len(inputs)]
    names = ["the sum of products", "the addend"][: len(inputs)]
    bias = shaped("bias").astype(np.int64)
    return _made(program, op, [acc, *inputs[1:]], [shaped(role) for role in roles], shaped("shift"), names, bias)


def _add(program: Program, op: Op, inputs: list[Array]) -> Requantization:
    axes = max(x.ndim for x in inputs)
    terms = [x.reshape((1,) * (axes - x.ndim) + x.shape) for x in inputs]
    return _made(
        program, op, terms, list(_constant(program, op, "multiplier")), _constant(program, op, "shift"),
        ["the first operand", "the second operand"],
    )  # fmt: skip


def _cat(program: Program, op: Op, inputs: list[Array]) -> Requantization:
    axis = op.attrs["axis"]
    columns = (
        np.concatenate([np.full_like(x, n, dtype=np.int64) for x, n in zip(inputs, table, strict=True)], axis)
        for table in (_constant(program, op, "multiplier"), _constant(program, op, "shift"))
    )
    multiplier, shift = columns
    return _made(program, op, [np.concatenate(inputs, axis)], [multiplier], shift, ["the inputs"])


def _sums(program: Program, op: Op, inputs: list[Array]) -> Requantization | None:
    """Sums of windows or products: the same op with factor 1 and the clamp of int32."""
    one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    constants: dict[str, Any] = {"one": one, "zero": zero}
    bare = replace(
        op, attrs={**op.attrs, "lo": INT32[0], "hi": INT32[1]}, consts={"multiplier": "one", "shift": "zero"}
    )
    sums = _run(replace(program, constants=constants), bare, inputs)
    if np.abs(sums).max(initial=0) >= 2**24:  # the kernel ends in float32
        return None
    return _made(
        program, op, [sums], [_constant(program, op, "multiplier")], _constant(program, op, "shift"), ["the sum"]
    )


_BUILDERS: dict[str, Callable[[Program, Op, list[Array]], Requantization | None]] = {
    "add": _add,
    "cat": _cat,
    "avg_pool": _sums,
    "adaptive_avg_pool": _sums,
    "matmul": _sums,
    "mul": _sums,
}


# -- quantize ----------------------------------------------------------------------------------------------------------


def quantize_rules(x: Array, scale: float, dtype: str) -> dict[str, Array]:
    """Codes of the float32 array ``x`` by other rules than section 2's."""
    lo, hi = limits(dtype)
    ratio = (x / np.float32(scale)).astype(np.float64)
    away = np.sign(ratio) * np.floor(np.abs(ratio) + 0.5)
    found = {
        "half away from zero": away,
        "half up": np.floor(ratio + 0.5),
        "floor": np.floor(ratio),
        "towards zero (truncation)": np.trunc(ratio),
        "product with the float32 reciprocal of the scale": np.rint(x * (np.float32(1) / np.float32(scale))),
    }
    return {name: np.clip(codes, lo, hi).astype(np.int64) for name, codes in found.items()}
