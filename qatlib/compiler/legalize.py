"""What a target refuses: kinds, dtypes, sizes, float islands, wide multipliers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import qatlib.ops  # noqa: F401  (fills the registry)
from qatlib.compiler.steps import is_host
from qatlib.compiler.target import OpRule, Target
from qatlib.compiler.tasks import mac_dtype
from qatlib.ops.base import BY_KIND
from qatlib.program import Op, Program
from qatlib.qtype import BYTES


@dataclass(frozen=True)
class Violation:
    """One reason why an op cannot run on the target.

    Args:
        code: QAT184 kind, QAT185 dtype, QAT186 size, QAT187 float, QAT188 multiplier.
        op: name of the op, with its module in the user's model where that differs.
        seen: what the op needs and what the target offers.
        fix: the nearest form that is legal.
    """

    code: str
    op: str
    seen: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code} {self.op}: {self.seen}. {self.fix}."


def check_model(program: Program, target: Target) -> tuple[Violation, ...]:
    """Every violation, in program order; empty if the whole Program runs on the target.

    Quantize ops that read an input of the Program and dequantize ops that no op reads are the host's, and legal.
    """
    return tuple(found for op in program.ops if not is_host(op, program) for found in _check(op, program, target))


def _check(op: Op, program: Program, target: Target) -> Iterator[Violation]:
    where = op.name if op.module in ("", op.name) else f"{op.name} ({op.module})"
    if op.kind in ("float_op", "quantize", "dequantize"):
        yield Violation("QAT187", where, *_float(op, program))
        return
    rule = target.ops.get(op.kind)
    if rule is None:
        fix = f"Build the layer from its kinds: {', '.join(sorted(target.ops))}"
        yield Violation("QAT184", where, f"{target.name} has no {op.kind!r}", fix)
        return
    for seen, fix in _dtypes(op, program, rule, target):
        yield Violation("QAT185", where, seen, fix)
    for seen, fix in _sizes(op, program, rule):
        yield Violation("QAT186", where, seen, fix)
    for seen, fix in _multipliers(op, program, target):
        yield Violation("QAT188", where, seen, fix)


def _float(op: Op, program: Program) -> tuple[str, str]:
    if op.kind == "float_op":
        return (
            f"{op.attrs.get('operator', 'operator')!r} runs in float: a float island",
            "Quantize it: take its module out of qat.hybrid and convert.preserve",
        )
    if op.kind == "quantize":
        return (
            f"quantizes {op.inputs[0]!r} in the middle of the Program",
            f"Quantize what makes {op.inputs[0]!r}; only inputs of the Program are quantized by the host",
        )
    readers = ", ".join(sorted(other.name for other in program.ops if op.output in other.inputs))
    return (
        f"makes float values that {readers} reads",
        f"Quantize {readers}, or end the Program at {op.name}; only results are dequantized by the host",
    )


def _dtypes(op: Op, program: Program, rule: OpRule, target: Target) -> Iterator[tuple[str, str]]:
    for value in program.in_values(op):
        dtype = value.qtype.dtype
        if dtype not in rule.inputs:
            yield f"reads {value.name!r} as {dtype}; {_allowed('inputs', rule.inputs)}", _use(dtype, rule.inputs)
    dtype = program.values[op.output].qtype.dtype
    if dtype not in rule.outputs:
        yield f"writes {dtype}; {_allowed('outputs', rule.outputs)}", _use(dtype, rule.outputs)
    if "weight" in op.consts:
        weight = str(program.constant(op, "weight").dtype).removeprefix("torch.")
        if weight not in rule.weights:
            yield f"has {weight} weights; {_allowed('weights', rule.weights)}", _use(weight, rule.weights)
    if BY_KIND[op.kind].cost(op, program).macs:
        wide = mac_dtype(op, program)
        if wide in (*rule.inputs, *rule.weights) and target.mac_array.slowdown(wide) is None:
            yield f"multiplies {wide}; the MAC array does not take it", _use(wide, ("int8",))


def _allowed(what: str, dtypes: Sequence[str]) -> str:
    return f"allowed {what}: {', '.join(dtypes)}"


def _use(dtype: str, allowed: Sequence[str]) -> str:
    narrower = [other for other in allowed if BYTES[other] <= BYTES[dtype]]
    nearest = max(narrower, key=lambda d: BYTES[d]) if narrower else min(allowed, key=lambda d: BYTES[d])
    return f"Make it {nearest} in qconfig"


def _multipliers(op: Op, program: Program, target: Target) -> Iterator[tuple[str, str]]:
    roles = [role for role in op.consts if role.endswith("multiplier")]
    bits = max(
        (_significant_bits(m) for role in roles for m in program.constant(op, role).flatten().tolist()), default=0
    )
    if bits > target.multiplier_bits:
        yield (
            f"has a multiplier of {bits} bits; {target.name} multiplies by {target.multiplier_bits}",
            f"Convert with multiplier_bits {target.multiplier_bits}",
        )


def _significant_bits(multiplier: int) -> int:
    """Bits between the highest and the lowest 1, both included; a shift supplies the zeros below."""
    return multiplier.bit_length() - ((multiplier & -multiplier).bit_length() - 1) if multiplier else 0


def _sizes(op: Op, program: Program, rule: OpRule) -> Iterator[tuple[str, str]]:
    kernel = _kernel(op, program)
    for what, seen, most in (
        ("kernel", kernel, rule.max_kernel),
        ("stride", tuple(op.attrs.get("stride", ())), rule.max_stride),
        ("dilation", tuple(op.attrs.get("dilation", ())), rule.max_dilation),
        ("channels", _channels(op, program), rule.max_channels),
        ("number of spatial axes", (len(kernel),), rule.max_spatial_axes),
    ):
        if most is not None and max(seen, default=0) > most:
            shown = "x".join(str(size) for size in seen)
            yield f"{what} {shown} exceeds {most}", f"Nearest legal: {what} {_cut(seen, most)}"


def _cut(seen: Sequence[int], most: int) -> str:
    return "x".join(str(min(size, most)) for size in seen)


def _kernel(op: Op, program: Program) -> tuple[int, ...]:
    """Window per spatial axis, () for an op without one; an adaptive pool's widest window."""
    if "weight" in op.consts:
        return tuple(program.constant(op, "weight").shape[2:])
    if "output_size" in op.attrs:
        out = op.attrs["output_size"]
        sizes = program.values[op.inputs[0]].shape[-len(out) :]
        return tuple(max(-(-(i + 1) * n // m) - i * n // m for i in range(m)) for n, m in zip(sizes, out, strict=True))
    return tuple(op.attrs.get("kernel", ()))


def _channels(op: Op, program: Program) -> tuple[int, ...]:
    """Largest number of channels read, and number written."""
    if "weight" in op.consts:
        outputs, inputs = program.constant(op, "weight").shape[:2]
        return inputs * op.attrs.get("groups", 1), outputs
    read = [value.shape[1] for value in program.in_values(op) if len(value.shape) > 1]
    written = program.values[op.output].shape
    return max(read, default=0), written[1] if len(written) > 1 else 0
