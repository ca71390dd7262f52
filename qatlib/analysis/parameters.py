"""Weights and biases of every op in real numbers, with the format that integers give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qatlib.analysis.op_facts import program_facts
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.op import FakeOp
from qatlib.graph.ir import CONSTANT
from qatlib.program import Op, Program
from qatlib.qtype import FLOAT, INT32


@dataclass(frozen=True, eq=False)
class Parameter:
    """``values`` are real; ``scales`` has one number per output channel, or one, or none where it has no integers."""

    role: str
    values: Tensor
    dtype: str = FLOAT.dtype
    scales: tuple[float, ...] = ()


def parameters_of(
    model: FakeQuantModel, quantized: bool, exact: FakeQuantModel | None = None
) -> dict[str, tuple[Parameter, ...]]:
    """By op; ``quantized``: as the op computes with them, else before rounding. Values of constants are no parameters.

    Formats are those of the calibrated ``model``; ``exact`` has the float values, where they are not its own.
    """
    found = {}
    for name, op in model.ops():
        if op.node.op != CONSTANT:
            values = op.quantized_params() if quantized else (exact or model).op(name).float_params()
            found[name] = tuple(_of_fake(model, op, values))
    return found


def _of_fake(model: FakeQuantModel, op: FakeOp, values: Mapping[str, Tensor]) -> Iterator[Parameter]:
    weights = op.weight_fake_quant
    source = model.quantizer(op.node.inputs[0]) if op.node.inputs else None
    for role, tensor in values.items():
        if weights is None or role not in ("weight", "bias"):
            yield Parameter(role, tensor.detach())
            continue
        scales = op.weight_scales().detach()
        if role == "weight":
            yield Parameter(role, tensor.detach(), weights.spec.dtype, tuple(scales.tolist()))
        elif source is not None:
            yield Parameter(role, tensor.detach(), INT32.dtype, tuple((scales * source.scale).tolist()))
        else:
            yield Parameter(role, tensor.detach())


def parameters_of_program(program: Program) -> dict[str, tuple[Parameter, ...]]:
    """Weights and biases of a Program's convolutions and linears, by op; those of float ops as they are."""
    facts = {fact.name: fact for fact in program_facts(program)}
    found: dict[str, tuple[Parameter, ...]] = {}
    for op in program.ops:
        if op.kind == "float_op":
            found[op.name] = tuple(Parameter(role, program.constant(op, role)) for role in op.consts)
        elif op.name in facts and (weight := facts[op.name].weight) and weight.scales:
            found[op.name] = tuple(_of_op(program, op, weight.scales, weight.dtype))
    return found


def _of_op(program: Program, op: Op, scales: tuple[float, ...], dtype: str) -> Iterator[Parameter]:
    def real(role: str, unit: Any) -> Tensor:
        codes = program.constant(op, role).double()
        return codes * codes.new_tensor(unit).view(-1, *[1] * (codes.dim() - 1))

    yield Parameter("weight", real("weight", scales), dtype, scales)
    s_x = program.values[op.inputs[0]].qtype.scale
    if "bias" in op.consts and s_x is not None:
        units = tuple(scale * s_x for scale in scales)
        yield Parameter("bias", real("bias", units), INT32.dtype, units)
