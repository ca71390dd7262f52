"""The integer flavour: standard ONNX operators that give every runtime the integers of the Program.

Integer arithmetic runs in ConvInteger and MatMulInteger, whose int32 sums are exact by their definition, and in
float64, which is exact on integers below 2^53. Only operators and dtypes that ONNX Runtime implements on a CPU are
used; there int16 can be cast and moved, but not computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qatlib.errors import ProgramError
from qatlib.export.graph import Array, Graph
from qatlib.ops.base import BY_KIND
from qatlib.program import Op
from qatlib.qtype import QType, limits

ByteProduct = Callable[[str, str, Array], str]
"""``(x, zero_point, weight) -> int32 sums of (x - zero_point) * weight``: names of int8 tensors, ``zero_point`` empty
for 0, and int8 weights ``[O, I/groups, ...]``."""


class IntegerGraph(Graph):
    """What ``Operator.export`` writes with.

    Every value of the Program becomes a tensor of that name and dtype. An op reads its inputs, computes, and writes its
    output, as here for the sum of two codes::

        a, b = (graph.read(name, "float64") for name in op.inputs)
        total = graph.requantize([(a, m1), (b, m2)], shift, op.attrs["lo"], op.attrs["hi"])
        graph.write(op.output, total)

    ========================================= ==================================================================
    :meth:`read`                              a value in another dtype, cast once
    :meth:`node`, :meth:`node_outputs`        any standard ONNX operator
    :meth:`constant`                          an initializer, stored once
    :meth:`requantize`                        section 3: multiply, shift, round half to even, clamp
    :meth:`clip`, :meth:`saturate`            clamp to a range, to int32
    :meth:`cast`                              a computed tensor in another dtype
    :meth:`sums`                              exact sums of products with int8 weights
    :meth:`gather_table`                      one entry of a table per code (256 or 65,536)
    :meth:`quantize`, :meth:`real`            section 2
    :meth:`pad`, :meth:`reshape`              of any tensor
    :meth:`write`                             a computed tensor becomes a value
    :meth:`move`                              one node that moves bits and keeps the dtype becomes a value
    ========================================= ==================================================================

    A float64 tensor of integers is exact below 2^53, a float32 one below 2^24: read int8 and int16 in either, int32 in
    float64. Clip, Round, Mul, MatMul and ReduceSum exist for both; Conv only for float32.
    """

    def __init__(self, program: Any) -> None:
        super().__init__(program)
        self._casts: dict[tuple[str, str], str] = {}

    def add(self, op: Op) -> None:
        self.scope = op.output
        BY_KIND[op.kind].export(op, self.program, self)

    # -- values --------------------------------------------------------------------------------------------------

    def qtype(self, name: str) -> QType:
        return self.program.values[name].qtype

    def read(self, name: str, dtype: str) -> str:
        """Value ``name`` as a tensor of ``dtype`` (a key of :data:`qatlib.export.graph.DTYPES`)."""
        if self.qtype(name).dtype == dtype:
            return name
        if (name, dtype) not in self._casts:
            self._casts[name, dtype] = self.cast(name, dtype)
        return self._casts[name, dtype]

    def write(self, name: str, x: str) -> None:
        """Value ``name`` is ``x``, integers within its range in any dtype, or real numbers for a float32 value."""
        self.cast(x, self.qtype(name).dtype, output=name)

    def move(self, op: Op, op_type: str, *more: str, **attrs: Any) -> None:
        """The output of ``op`` is ``op_type`` of its inputs and ``more``: Transpose, Reshape, Gather, Slice …"""
        self.node(op_type, *op.inputs, *more, output=op.output, **attrs)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def requantize(self, terms: Sequence[tuple[str, Array]], shift: Array, lo: int, hi: int) -> str:
        """``clamp(rne(sum(term * M) / 2^n), lo, hi)`` in float64.

        Terms are float64 tensors of integers with their multipliers; ``shift`` is n. Multipliers and shift broadcast
        against the terms. Every ``|term * M|`` and the sum stay below 2^53 (Programs are built so), hence
        ``term * (M / 2^n)`` and the sum are exact and Round is the only rounding.
        """
        power = np.ldexp(1.0, -np.asarray(shift, dtype=np.int64))
        products = [self.node("Mul", x, self.constant(m.astype(np.float64) * power)) for x, m in terms]
        total = products[0]
        for product in products[1:]:
            total = self.node("Add", total, product)
        return self.clip(self.node("Round", total), lo, hi)

    def clip(self, x: str, lo: int, hi: int, dtype: str = "float64") -> str:
        """``x`` of ``dtype`` clamped to [lo, hi]."""
        return self.node("Clip", x, self.constant(np.array(lo, dtype)), self.constant(np.array(hi, dtype)))

    def saturate(self, acc: str, bound: int) -> str:
        """``sat32`` of float64 sums whose magnitude is at most ``bound``."""
        lo, hi = limits("int32")
        return self.clip(acc, lo, hi) if bound > hi else acc

    def gather_table(self, name: str, entries: Array) -> str:
        """``entries[code - qmin]`` for the codes of int8 or int16 value ``name``, in the dtype of ``entries``."""
        offset = self.constant(np.array(-limits(self.qtype(name).dtype)[0], np.int32))
        return self.node("Gather", self.constant(entries), self.node("Add", self.read(name, "int32"), offset))

    def quantize(self, x: str, qtype: QType) -> str:
        """Codes of real numbers, float32: section 2. ONNX has no errors: the code of a NaN is undefined."""
        assert qtype.scale is not None
        ratio = self.node("Div", x, self.constant(np.float32(qtype.scale)))
        return self.clip(self.node("Round", ratio), *qtype.limits, dtype="float32")

    def real(self, name: str) -> str:
        """Real numbers of a float32, int8 or int16 value, float32."""
        qtype = self.qtype(name)
        codes = self.read(name, "float32")
        return codes if qtype.scale is None else self.node("Mul", codes, self.constant(np.float32(qtype.scale)))

    # -- sums of products ----------------------------------------------------------------------------------------

    def sums(self, name: str, weight: Array, product: ByteProduct, channel_axis: int, groups: int = 1) -> str:
        """Exact sums of products of value ``name`` with int8 or int16 ``weight`` ``[O, I/groups, ...]``, float64.

        An int16 weight is 256 times a high byte plus a low byte; a high byte of 128, which int8 has not, is cut in two.
        """
        total = None
        for unit, part in _weight_bytes(weight):
            sums = self._byte_sums(name, part, product, channel_axis, groups)
            sums = sums if unit == 1 else self.node("Mul", sums, self.constant(np.float64(unit)))
            total = sums if total is None else self.node("Add", total, sums)
        assert total is not None
        return total

    def _byte_sums(self, name: str, weight: Array, product: ByteProduct, channel_axis: int, groups: int) -> str:
        """Sums of products with int8 weights.

        ``product`` sums bytes in int32 for the input channels on ``channel_axis``. An int16 code is 256 times its high
        byte plus its low byte: ``x = 256 h + (l + 128)`` with h, l in int8, so two products do. Where an int32 sum
        might overflow, the input channels are cut into chunks.
        """
        if self.qtype(name).dtype == "int8":
            parts, largest = [(name, "", 1)], 128
        else:
            high, low = self._bytes(name)
            parts, largest = [(high, "", 256), (low, self.constant(np.int8(-128)), 1)], 255
        total = None
        for start, stop in self._chunks(weight, largest):
            for x, zero_point, unit in parts:
                if stop - start < weight.shape[1]:
                    channels = [g * weight.shape[1] + c for g in range(groups) for c in range(start, stop)]
                    x = self.node("Gather", x, self.constant(np.array(channels)), axis=channel_axis)
                part = self.cast(product(x, zero_point, weight[:, start:stop]), "float64")
                part = part if unit == 1 else self.node("Mul", part, self.constant(np.float64(unit)))
                total = part if total is None else self.node("Add", total, part)
        assert total is not None
        return total

    def _bytes(self, name: str) -> tuple[str, str]:
        """int8 tensors h and l of an int16 value: ``x = 256 h + l + 128``. float32 is exact here."""
        x = self.read(name, "float32")
        high = self.node("Floor", self.node("Mul", x, self.constant(np.float32(2**-8))))
        low = self.node("Sub", x, self.node("Mul", high, self.constant(np.float32(2**8))))
        return self.cast(high, "int8"), self.cast(self.node("Sub", low, self.constant(np.float32(128))), "int8")

    def _chunks(self, weight: Array, largest: int) -> list[tuple[int, int]]:
        """Ranges of input channels whose sums, for input bytes up to ``largest``, stay within int32."""
        sums = np.abs(weight.astype(np.int64)).reshape(*weight.shape[:2], -1).sum(axis=2) * largest
        highest = limits("int32")[1]
        if sums.max() > highest:
            raise ProgramError(
                "QAT220", self.scope, "the taps of one input channel pass int32", "Use a kernel below 65,000 taps"
            )
        starts, running = [0], np.zeros(len(sums), np.int64)
        for channel in range(sums.shape[1]):
            running = running + sums[:, channel]
            if running.max() > highest:
                starts.append(channel)
                running = sums[:, channel]
        return list(zip(starts, [*starts[1:], sums.shape[1]], strict=True))


def _weight_bytes(weight: Array) -> list[tuple[int, Array]]:
    """Factors and int8 tensors whose sum is ``weight``."""
    if weight.dtype == np.int8:
        return [(1, weight)]
    wide = weight.astype(np.int64)
    low = (wide + 128) % 256 - 128
    high = (wide - low) // 256
    parts = [(256, np.minimum(high, 127)), (256, np.maximum(high - 127, 0)), (1, low)]
    return [(unit, part.astype(np.int8)) for unit, part in parts if part.any() or unit == 1]
