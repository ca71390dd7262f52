"""The QDQ flavour: float operators between DequantizeLinear and QuantizeLinear, which runtimes fuse to int8 kernels.

The scales are the Program's, the arithmetic is the runtime's: the result is close to the Program, not equal to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qatlib.errors import ProgramError
from qatlib.export.graph import Array, Graph
from qatlib.ops.base import BY_KIND
from qatlib.program import Op, Program, Value


class QdqGraph(Graph):
    """int8 and int16 values are tensors of their name and dtype; int32 accumulators are float32 real numbers.

    DequantizeLinear comes without a zero point: ONNX Runtime 1.32 moves one with an int8 zero point through a Transpose
    wrongly, and then refuses its own graph.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._reals: dict[str, str] = {}

    def add(self, op: Op) -> None:
        self.scope = op.output
        operator = BY_KIND[op.kind]
        attrs, consts = operator.float_form(op, self.program, self)
        self.write(op.output, operator.export_float(attrs, [self.real(name) for name in op.inputs], consts, self))

    def real(self, name: str) -> str:
        """Value ``name`` as float32 real numbers, made once. Integers without a scale are numbers of the unit 1."""
        value = self.program.values[name]
        qtype = value.qtype
        if self.dtype(value) == "float32":
            return name
        if name not in self._reals and qtype.scale is None:
            self._reals[name] = self.cast(name, "float32")
        elif name not in self._reals:
            self._reals[name] = self.node("DequantizeLinear", name, self.constant(np.float32(qtype.scale)))
        return self._reals[name]

    def write(self, name: str, x: str) -> None:
        """Value ``name`` is the code of the real numbers ``x``, or ``x`` itself where it has no scale."""
        value = self.program.values[name]
        if value.qtype.scale is None:
            self.cast(x, self.dtype(value), output=name)
        else:
            zero = self.constant(np.array(0, value.qtype.dtype))  # its dtype is that of the codes
            self.node("QuantizeLinear", x, self.constant(np.float32(value.qtype.scale)), zero, output=name)

    def dtype(self, value: Value) -> str:
        accumulator = value.qtype.dtype == "int32" and self._reader(value.name) is not None
        return "float32" if accumulator else value.qtype.dtype

    def _reader(self, name: str) -> Op | None:
        """The ``dequantize`` that makes real numbers of an accumulator."""
        return next((op for op in self.program if op.kind == "dequantize" and name in op.inputs), None)

    def dequantized(self, codes: Array, scales: Array, name: str) -> str:
        """int8 or int32 constants ``[O, ...]`` with one scale per O, as float32 real numbers."""
        scale = self.constant(scales.astype(np.float32), f"{name}.scale")
        return self.node("DequantizeLinear", self.constant(codes, name), scale, axis=0)

    def real_attrs(self, op: Op) -> dict[str, Any]:
        """Attributes of ``op`` with its output clamp as real bounds: ``clamp``, None where the format is the limit."""
        qtype, attrs = self.program.values[op.output].qtype, dict(op.attrs)
        if "lo" in attrs and qtype.scale is not None:
            pairs = zip((attrs["lo"], attrs["hi"]), qtype.limits, strict=True)
            bounds = [None if code == limit else code * qtype.scale for code, limit in pairs]
            attrs["clamp"] = None if bounds == [None, None] else bounds
        return attrs

    def accumulator_scale(self, op: Op) -> Array:
        """Real value of one unit of the accumulator of ``op``, per output channel: float64 ``[O]``.

        It is what its multipliers say, so up to half a unit of M away from the product of the scales; for an int32
        output, the scale that its ``dequantize`` uses.
        """
        out = self.program.values[op.output].qtype
        if out.scale is not None:
            multiplier, shift = (self.program.constant(op, role).double().numpy() for role in ("multiplier", "shift"))
            return np.asarray(multiplier * 2.0**-shift * out.scale)
        reader = self._reader(op.output)
        if reader is None:
            raise ProgramError(
                "QAT220", op.name, "is an int32 accumulator that nothing dequantizes", "Use the flavour integer"
            )
        count = len(self.program.constant(op, "bias"))
        return np.broadcast_to(self.program.constant(reader, "scale").double().numpy().reshape(-1), (count,))
