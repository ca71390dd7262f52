"""What an operator sees while it is lowered to Program ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from qatlib.fake.op import FakeOp
from qatlib.ops.base import BY_KIND, Attrs, Range
from qatlib.ops.clamp import output_clamp
from qatlib.program import Op, Value
from qatlib.qtype import QType, check_scale
from qatlib.tables import DEFAULT_TABLE, Reals, TableSpec


class Emitter:
    """Collects ops, values and constants of the Program under construction, and the proven range of every code."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.constants: dict[str, Tensor] = {}
        self.ranges: dict[str, Range] = {}
        self.accumulator_scales: dict[str, Tensor] = {}

    def add_value(self, value: Value, codes: Range) -> None:
        self.values[value.name] = value
        self.ranges[value.name] = codes

    def add_op(
        self,
        kind: str,
        value: Value,
        inputs: tuple[str, ...],
        attrs: Attrs,
        consts: Mapping[str, Tensor],
        module: str,
        origin: str,
    ) -> Op:
        """Append an op that writes ``value``; its constants are stored under ``<value>.<role>``."""
        keys = {role: f"{value.name}.{role}" for role in consts}
        self.constants.update({keys[role]: tensor.detach().cpu().contiguous() for role, tensor in consts.items()})
        op = Op(kind, value.name, inputs, dict(attrs), keys, module, origin)
        ranges = [self.ranges[name] for name in inputs]
        codes = (0, 0) if value.qtype.is_float else BY_KIND[kind].out_range(op, value, ranges)
        self.add_value(value, codes)
        self.ops.append(op)
        return op


class Lowering:
    """One node on its way to the Program. Scales are float64 copies of float32 values."""

    def __init__(
        self,
        emitter: Emitter,
        fake: FakeOp,
        inputs: tuple[str, ...],
        out: QType,
        bits: int,
        table: TableSpec = DEFAULT_TABLE,
        observed: tuple[Reals | None, ...] = (),
    ) -> None:
        self._emitter, self._fake, self._input_names = emitter, fake, inputs
        self.node, self.attrs, self.name = fake.node, fake.node.attrs, fake.node.name
        self.out, self.bits = out, bits
        self.inputs = tuple(emitter.values[name] for name in inputs)
        self.table, self._observed = table, observed

    @property
    def params(self) -> dict[str, Tensor]:
        """Float parameters as trained."""
        return self._fake.float_params()

    @property
    def output_scale(self) -> float:
        assert self.out.scale is not None
        return self.out.scale

    def input_scale(self, index: int) -> float:
        scale = self.inputs[index].qtype.scale
        assert scale is not None
        return scale

    def codes(self, index: int) -> Range:
        """Proven range of the codes of an input."""
        return self._emitter.ranges[self._input_names[index]]

    def observed(self, index: int) -> Reals | None:
        """Real range (low, high) that calibration saw of an input; None if it was not calibrated."""
        return self._observed[index] if self._observed else None

    def largest(self, index: int) -> int:
        """Largest magnitude that the codes of an input can have."""
        lo, hi = self.codes(index)
        return max(-lo, hi)

    def weight(self) -> tuple[Tensor, np.ndarray[Any, np.dtype[np.float64]]]:
        """int8 codes ``[O, …]`` and float64 scales ``[O]``."""
        quantizer = self._fake.weight_fake_quant
        assert quantizer is not None
        weight = self.params["weight"]
        scales = self._fake.weight_scales()
        for channel, scale in enumerate(scales.tolist()):
            check_scale(scale, f"{self.name} weight of channel {channel}")
        return quantizer.codes(weight, scales).cpu(), scales.cpu().double().numpy()

    def output_clamp(self) -> Range:
        return output_clamp(self.out, self.attrs.get("clamp"))

    def emit(
        self,
        kind: str,
        attrs: Attrs,
        consts: Mapping[str, Tensor] | None = None,
        accumulator_scale: Tensor | None = None,
    ) -> None:
        """Write the op that makes this node's value. An int32 output brings the scale its ``dequantize`` needs."""
        value = Value(self.name, self.node.shape, self.out)
        origin = " + ".join((self.node.module_type.rpartition(".")[2], *self.node.absorbed))
        self._emitter.add_op(kind, value, self._input_names, attrs, consts or {}, self.node.module, origin)
        if accumulator_scale is not None:
            self._emitter.accumulator_scales[self.name] = accumulator_scale
