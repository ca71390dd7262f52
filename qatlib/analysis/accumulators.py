"""Sums whose proven bound is beyond 32 bits: how large they really get, and how many saturate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qatlib.analysis.records import Saturation
from qatlib.integer import INT32, exact_kernels
from qatlib.ops.base import BY_KIND
from qatlib.ops.dense import Dense
from qatlib.program import Op, Program


def may_saturate(op: Op) -> bool:
    """Whether ``convert`` could not prove that the sums of the op stay within int32."""
    return bool(op.attrs.get("acc_bound", 0) > INT32[1])


def sums(op: Op, program: Program, inputs: Sequence[Tensor]) -> Tensor:
    """The accumulator before saturation, float64: exact, for ``convert`` refuses bounds beyond 2^53."""
    operator = BY_KIND[op.kind]
    terms = [x.double() for x in inputs]
    with exact_kernels():
        if isinstance(operator, Dense):
            weight, bias = (program.constant(op, role).double() for role in ("weight", "bias"))
            return operator.product(op)(terms[0], weight, bias)
        if op.kind == "matmul":
            a, b = (x if p == 0 else (x * 2.0**-p).round_() for x, p in zip(terms, op.attrs["drop"], strict=True))
            return a @ b
        return terms[0].sum(op.attrs["axes"], op.attrs["keepdim"])


class SaturationGauge:
    """Counts over batches; the inputs are carriers of integer codes."""

    def __init__(self, op: Op, program: Program) -> None:
        self._op, self._program = op, program
        self._largest = self._saturated = self._elements = 0

    def add(self, inputs: Sequence[Tensor]) -> None:
        acc = sums(self._op, self._program, inputs)
        if acc.numel() == 0:
            return
        self._largest = max(self._largest, int(acc.abs().max()))
        self._saturated += int(((acc < INT32[0]) | (acc > INT32[1])).sum())
        self._elements += acc.numel()

    def result(self) -> Saturation:
        bound = int(self._op.attrs["acc_bound"])
        return Saturation(self._op.name, bound, self._largest, self._saturated, self._elements)
