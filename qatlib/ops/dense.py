"""What convolution and linear share: weights, bias, an exact accumulator, an optional addend, a requantized output."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qatlib.factors import fused_factors, lone_factor
from qatlib.integer import INT32, Product, Requantizer
from qatlib.ops.accumulator import Accumulator
from qatlib.ops.base import Attrs, Call, Cost, Kernel, Operator, Params, Range, Ref, Traced
from qatlib.ops.clamp import apply_clamp, export_clamp
from qatlib.ops.region import Box, Need, Part, broadcast
from qatlib.program import Op, Program

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import ByteProduct, IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering


class Dense(Operator):
    """An operator whose output channels are sums of weight times input, plus bias."""

    takes_clamp = True
    channel_axis: int
    """Axis of the input and output that holds channels: 1, or -1 for linear."""

    @abstractmethod
    def geometry_attrs(self, attrs: Attrs) -> dict[str, Any]:
        """The attributes that the Program op keeps."""

    @abstractmethod
    def product(self, op: Op) -> Product:
        """The exact sum of products for one Program op."""

    @abstractmethod
    def float_product(self, attrs: Attrs, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The sum of products in float."""

    @abstractmethod
    def export_bytes(self, op: Op, graph: IntegerGraph) -> ByteProduct:
        """The sum of products of int8 tensors as ONNX nodes."""

    @abstractmethod
    def export_product(self, attrs: Attrs, x: str, weight: str, bias: str, graph: Graph) -> str:
        """:meth:`float_product` as ONNX nodes."""

    @abstractmethod
    def over_channels(self, vector: Tensor, axes: int) -> Tensor:
        """Shape ``[O]`` so that it broadcasts over an output with ``axes`` axes."""

    def weighted(self, call: Call, x: Any, weight: Any, bias: Any, attrs: dict[str, Any]) -> Traced:
        """Check that the weights are constants and the input is not."""
        if isinstance(weight, Ref) or isinstance(bias, Ref):
            raise call.refuse(
                f"{self.name} takes weights computed in the model; only parameters and buffers can be quantized once",
                "Keep the weights as parameters of a module",
            )
        if not isinstance(x, Ref):
            raise call.refuse(f"{self.name} of a constant", "Compute the constant once, in __init__")
        if bias is None:
            bias = torch.zeros_like(weight.detach().flatten(1)[:, 0])
        return Traced((x,), attrs, {"weight": weight, "bias": bias})

    def forward(self, attrs: Attrs, params: Params, *inputs: Tensor) -> Tensor:
        out = self.float_product(attrs, inputs[0], params["weight"], params["bias"])
        if len(inputs) == 2:
            out = out + inputs[1]
        return apply_clamp(out, attrs.get("clamp"), owned=True)

    # -- lowering ------------------------------------------------------------------------------------------------

    def lower(self, low: Lowering) -> None:
        codes, weight_scale = low.weight()
        input_scale = low.input_scale(0)
        acc_scale = input_scale * weight_scale
        bias = np.clip(np.rint(low.params["bias"].detach().cpu().double().numpy() / acc_scale), *INT32)
        attrs = self.geometry_attrs(low.attrs)
        consts = {"weight": codes, "bias": torch.from_numpy(bias.astype(np.int32))}
        sums = codes.to(torch.int64).abs().flatten(1).sum(1) * low.largest(0)
        attrs["acc_bound"] = int((sums + consts["bias"].to(torch.int64).abs()).max())
        if low.out.dtype == "int32":
            scale = torch.from_numpy(acc_scale.astype(np.float32))
            low.emit(self.name, attrs, consts, accumulator_scale=self.over_channels(scale, len(low.node.shape)))
            return
        attrs["lo"], attrs["hi"] = low.output_clamp()
        consts |= self._factors(low, acc_scale / low.output_scale)
        low.emit(self.name, attrs, consts)

    @staticmethod
    def _factors(low: Lowering, ratios: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Tensor]:
        """Multipliers and shifts per channel; ``ratios`` are accumulator scale over output scale."""
        roles: tuple[str, ...] = ("multiplier", "shift")
        if len(low.inputs) == 2:
            roles, r2 = ("multiplier", "addend_multiplier", "shift"), low.input_scale(1) / low.output_scale
            rows: list[tuple[int, ...]] = [fused_factors(r1, r2, low.bits, low.name) for r1 in ratios.tolist()]
        else:
            rows = [lone_factor(r1, low.bits, low.name) for r1 in ratios.tolist()]
        columns = zip(*rows, strict=True)
        return {role: torch.tensor(column, dtype=torch.int32) for role, column in zip(roles, columns, strict=True)}

    # -- integer -------------------------------------------------------------------------------------------------

    def kernel(self, op: Op, program: Program, ranges: Sequence[Range]) -> Kernel:
        weight, bias = program.constant(op, "weight"), program.constant(op, "bias")
        splittable = op.attrs.get("groups", 1) == 1
        largest = max(-ranges[0][0], ranges[0][1])
        acc = Accumulator.plan(weight, bias, largest, self.product(op), self.channel_axis, splittable)
        if "multiplier" not in op.consts:
            return acc
        axes = len(program.values[op.output].shape)
        roles = [role for role in ("multiplier", "addend_multiplier") if role in op.consts]
        requantize = Requantizer.plan(
            [self.over_channels(program.constant(op, role), axes) for role in roles],
            self.over_channels(program.constant(op, "shift"), axes),
            [min(acc.bound, 2**31), *(max(-lo, hi) for lo, hi in ranges[1:])],
            op.attrs["lo"],
            op.attrs["hi"],
        )

        def run(x: Tensor, *addend: Tensor) -> Tensor:
            return requantize(acc(x), *addend, reuse=True)

        run.route = acc.route  # type: ignore[attr-defined]
        return run

    # -- ONNX ----------------------------------------------------------------------------------------------------

    def export(self, op: Op, program: Program, graph: IntegerGraph) -> None:
        axes = len(program.values[op.output].shape)
        weight, bias = program.constant(op, "weight").numpy(), program.constant(op, "bias")
        groups = op.attrs.get("groups", 1)
        acc = graph.sums(op.inputs[0], weight, self.export_bytes(op, graph), self.channel_axis, groups)
        acc = graph.node("Add", acc, graph.constant(self.over_channels(bias.double(), axes).numpy()))
        largest = -graph.qtype(op.inputs[0]).limits[0]
        sums = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(axis=1) * largest
        acc = graph.saturate(acc, int((sums + bias.to(torch.int64).abs().numpy()).max()))
        if "multiplier" in op.consts:
            names = ("multiplier", "addend_multiplier", "shift")
            factors = {r: self.over_channels(program.constant(op, r), axes).numpy() for r in names if r in op.consts}
            terms = [(acc, factors["multiplier"])]
            if len(op.inputs) == 2:
                terms.append((graph.read(op.inputs[1], "float64"), factors["addend_multiplier"]))
            acc = graph.requantize(terms, factors["shift"], op.attrs["lo"], op.attrs["hi"])
        graph.write(op.output, acc)

    def export_float(self, attrs: Attrs, inputs: Sequence[str], consts: Mapping[str, str], graph: Graph) -> str:
        out = self.export_product(attrs, inputs[0], consts["weight"], consts["bias"], graph)
        if len(inputs) == 2:
            out = graph.node("Add", out, inputs[1])
        return export_clamp(graph, out, attrs.get("clamp"))

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        scales = graph.accumulator_scale(op)
        x = program.values[op.inputs[0]].qtype.scale
        assert x is not None
        weight, bias = (program.constant(op, role).numpy() for role in ("weight", "bias"))
        return graph.real_attrs(op), {
            "weight": graph.dequantized(weight, scales / x, op.consts["weight"]),
            "bias": graph.dequantized(bias, scales, op.consts["bias"]),
        }

    # -- regions -------------------------------------------------------------------------------------------------

    def channel_part(
        self, op: Op, program: Program, box: Box, span: tuple[int, int], reads: Box, attrs: Attrs | None = None
    ) -> Part:
        """Output channels in ``span`` from ``reads`` of the input, with ``attrs`` if they are not the op's."""
        out, (_, *addends) = program.values[op.output], program.in_values(op)
        needs = (Need(reads), *(Need(broadcast(box, out, value)) for value in addends))
        attrs = op.attrs if attrs is None else attrs
        if span == (0, program.constant(op, "weight").shape[0]) and attrs == op.attrs:
            return Part(needs)

        def consts() -> dict[str, Tensor]:
            return {role: program.constant(op, role)[slice(*span)] for role in op.consts}

        own = {name: value for name, value in attrs.items() if value != op.attrs.get(name)}
        return Part(needs, attrs, consts, (span, repr(own)))

    # -- cost ----------------------------------------------------------------------------------------------------

    def cost(self, op: Op, program: Program) -> Cost:
        base = super().cost(op, program)
        macs = program.values[op.output].elements() * program.constant(op, "weight")[0].numel()
        vector = base.vector_ops if len(op.inputs) == 2 else 0
        return Cost(macs, vector, base.weight_bytes, base.input_bytes, base.output_bytes)
