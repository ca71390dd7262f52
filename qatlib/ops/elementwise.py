"""What elementwise operators share: operands of one kind, shapes that broadcast, factors that end without an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qatlib.errors import ProgramError, QConfigError
from qatlib.factors import NOTHING, factor, lone_factor
from qatlib.integer import Requantizer
from qatlib.ops.base import Attrs, Call, Content, Operator, Range, Ref
from qatlib.ops.region import Regions, pointwise
from qatlib.program import Op, Program
from qatlib.qtype import limits

if TYPE_CHECKING:
    from qatlib.export.graph import Graph
    from qatlib.export.integer import IntegerGraph
    from qatlib.export.qdq import QdqGraph
    from qatlib.lowering import Lowering


class Elementwise(Operator):
    """An operator on activations of equal or broadcast shapes, or on integers without a scale."""

    def check_formats(self, node: str, inputs: Sequence[str], output: str) -> None:
        if output != "int32" and not {*inputs, output} <= {"int8", "int16"}:
            seen = f"{self.name} of {', '.join(inputs)} to {output}"
            raise QConfigError("QAT148", node, seen, "Use int8 or int16 before and after it")

    def regions(self, op: Op, program: Program) -> Regions:
        return pointwise(op, program)

    def float_form(self, op: Op, program: Program, graph: QdqGraph) -> tuple[Attrs, Mapping[str, str]]:
        return {**graph.real_attrs(op), "integers": reads_integers(op, program)}, {}


# -- operands ----------------------------------------------------------------------------------------------------------


def content_of(value: Any) -> Content:
    """Content of a graph tensor, constant tensor or number, by the rules of torch's type promotion."""
    if isinstance(value, Ref):
        return value.content
    if isinstance(value, Tensor):
        return "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "int"
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"


def promoted(*values: Any) -> Content:
    """Content of the result of arithmetic on ``values``."""
    contents = {content_of(value) for value in values}
    return "float" if "float" in contents else "int" if "int" in contents else "bool"


def number(value: Any) -> float | int | None:
    """The value of a number, or of a constant tensor without axes that does not train; None for anything else."""
    if isinstance(value, Tensor) and value.dim() == 0 and not isinstance(value, nn.Parameter):
        value = value.item()
    return value if isinstance(value, int | float) else None


def operand(call: Call, value: Any, content: Content) -> Ref:
    """``value`` as a node for arithmetic whose result has ``content``.

    Integers become real numbers where the result is real (step ``.cast``); truth values stay, as 0 and 1.
    Raises GraphError (QAT134) for what is neither a tensor nor a finite number.
    """
    if not isinstance(value, Ref | Tensor | int | float):
        raise call.refuse(f"an operand is a {type(value).__name__}", "Use tensors and real numbers")
    plain = number(value)
    if plain is not None and not math.isfinite(plain):
        raise call.refuse(f"an operand is {plain}", "Use a finite number, or masked_fill for what is to be masked")
    if content_of(value) == "int" and content == "float":
        if isinstance(value, Ref):
            return call.emit("cast", [value], {"to": "float"}, suffix=".cast")
        value = float(plain) if plain is not None else torch.as_tensor(value).float()
    if isinstance(value, int | float) and content != "float":
        value = torch.tensor(value)
    return call.ref(value)


# -- factors -----------------------------------------------------------------------------------------------------------


def sum_factors(
    ratios: tuple[float, float], largest: tuple[int, int], reach: int, bits: int, where: str
) -> tuple[int, int, int]:
    """``(M1, M2, n)`` of a sum of two terms with signed ``ratios``, section 4.

    Args:
        largest: largest magnitudes of the codes that the formats of the terms have.
        reach: the same of the output.
    """
    sizes = [abs(r) for r in ratios]
    if min(sizes) < NOTHING or not all(map(math.isfinite, sizes)):
        kept = sizes.index(max(sizes))
        multiplier, shift = lone_factor(sizes[kept], bits, where)
        signed = int(math.copysign(multiplier, ratios[kept]))
        return (signed, 0, shift) if kept == 0 else (0, signed, shift)
    small = sizes.index(min(sizes))
    sizes[1 - small] = min(sizes[1 - small], 2 * (reach + largest[small] * sizes[small]))
    shift = 0 if sizes[small] >= 2.0**bits - 0.5 else factor(sizes[small], bits, where)[1]
    while shift > 0 and math.ldexp(max(sizes), shift) >= 2**31 - 0.5:
        shift -= 1
    if math.ldexp(max(sizes), shift) >= 2**31 - 0.5:
        seen = f"scale ratios {list(ratios)} pass 2^31"
        raise ProgramError("QAT171", where, seen, "Bring the scales of its inputs and output closer together")
    m1, m2 = (int(math.copysign(_significant(size, shift, bits), r)) for size, r in zip(sizes, ratios, strict=True))
    return m1, m2, shift


def _significant(r: float, shift: int, bits: int) -> int:
    """``r * 2^shift`` rounded half to even to an integer of at most ``bits`` significant bits below 2^31."""
    drop = max(0, round(math.ldexp(r, shift)).bit_length() - bits)
    return min(round(math.ldexp(r, shift - drop)) << drop, ((1 << bits) - 1) << (31 - bits))


def constants(multipliers: Sequence[int], shifts: Sequence[int]) -> dict[str, Tensor]:
    """Consts ``multiplier`` and ``shift`` of a Program op."""
    return {
        "multiplier": torch.tensor(multipliers, dtype=torch.int32),
        "shift": torch.tensor(shifts, dtype=torch.int32),
    }


def branch_factors(low: Lowering, inputs: Sequence[int]) -> dict[str, Tensor]:
    """Consts of terms that are requantized one by one; integers without a scale stay as they are."""
    if low.out.scale is None:
        return constants([1] * len(inputs), [0] * len(inputs))
    pairs = [lone_factor(low.input_scale(i) / low.out.scale, low.bits, low.name) for i in inputs]
    return constants([m for m, _ in pairs], [n for _, n in pairs])


# -- integer -----------------------------------------------------------------------------------------------------------


def aligned(x: Tensor, axes: int) -> Tensor:
    """``x`` with axes of size 1 in front, so that it has ``axes`` of them."""
    return x.view(*[1] * (axes - x.dim()), *x.shape) if x.dim() < axes else x


def branch_requantizers(op: Op, program: Program, ranges: Sequence[Range]) -> list[Requantizer]:
    """One requantizer per term of :func:`branch_factors`; ``ranges`` are those of the terms."""
    multipliers, shifts = program.constant(op, "multiplier"), program.constant(op, "shift")
    terms = enumerate(ranges)
    return [
        Requantizer.plan([multipliers[i]], shifts[i], [max(-lo, hi)], op.attrs["lo"], op.attrs["hi"])
        for i, (lo, hi) in terms
    ]


def whole(op: Op, program: Program) -> bool:
    """Whether the op makes integers without a scale."""
    return program.values[op.output].qtype.dtype == "int32"


def reads_integers(op: Op, program: Program) -> bool:
    """Whether an input holds integers without a scale."""
    return any(value.qtype.dtype == "int32" for value in program.in_values(op))


def saturated(exact: Tensor) -> Tensor:
    """``sat32`` of int64 results, as a carrier."""
    return exact.clamp(*limits("int32")).double()


# -- ONNX --------------------------------------------------------------------------------------------------------------


def export_branches(op: Op, program: Program, graph: IntegerGraph, inputs: Sequence[str]) -> list[str]:
    """The requantized terms, float64."""
    multipliers, shifts = (program.constant(op, role).numpy() for role in ("multiplier", "shift"))
    lo, hi = op.attrs["lo"], op.attrs["hi"]
    return [
        graph.requantize([(graph.read(name, "float64"), multipliers[i])], shifts[i], lo, hi)
        for i, name in enumerate(inputs)
    ]


def export_saturated(graph: IntegerGraph, exact: str) -> str:
    """``sat32`` of int64 results."""
    lo, hi = (graph.constant(np.array(limit, np.int64)) for limit in limits("int32"))
    return graph.node("Clip", exact, lo, hi)


def export_reals(graph: Graph, inputs: Sequence[str], attrs: Attrs) -> list[str]:
    """Inputs of a float form as float32; where all are real numbers they are that already."""
    return [graph.cast(x, "float32") for x in inputs] if attrs.get("integers") else list(inputs)


def export_truth(graph: Graph, x: str) -> str:
    """Whether each element of ``x`` is not 0, as ONNX's bool."""
    return graph.node("Cast", x, to=9)  # TensorProto.BOOL
