"""Who runs an op, and in which order: the host quantizes, the accelerator computes, the host dequantizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qatlib.program import Op, Program

Unit = Literal["host", "npu"]


@dataclass(frozen=True)
class Step:
    """One op in execution order."""

    op: Op
    unit: Unit


def is_host(op: Op, program: Program) -> bool:
    """True for a quantize that reads an input of the Program and a dequantize that no op reads."""
    if op.kind == "quantize":
        return op.inputs[0] in program.inputs
    if op.kind == "dequantize":
        return not any(op.output in other.inputs for other in program.ops)
    return False


def order_steps(program: Program) -> tuple[Step, ...]:
    """Program order, with the host's quantize ops first and its dequantize ops last."""
    host = [op for op in program.ops if is_host(op, program)]
    before = [Step(op, "host") for op in host if op.kind == "quantize"]
    after = [Step(op, "host") for op in host if op.kind == "dequantize"]
    names = {op.name for op in host}
    return (*before, *(Step(op, "npu") for op in program.ops if op.name not in names), *after)
