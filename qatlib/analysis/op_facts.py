"""What a Program says about each of its ops: formats, weight scales, accumulator bound, and which are outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qatlib.analysis.records import call_title, match_name
from qatlib.graph.calls import calls_of_shared
from qatlib.program import Op, Program


@dataclass(frozen=True)
class WeightFact:
    """Per-channel weight formats of one conv or linear. ``scales`` is None where the Program does not tell them."""

    channels: int
    dead: tuple[int, ...]
    """Output channels whose weight codes are all zero."""
    scales: tuple[float, ...] | None = None
    dtype: str = "int8"

    @property
    def live_scales(self) -> tuple[float, ...]:
        return tuple(s for c, s in enumerate(self.scales or ()) if c not in set(self.dead))


@dataclass(frozen=True)
class TableFact:
    """One table: how its range is divided, its entries, and its errors in output codes over the input's codes."""

    function: str
    input_dtype: str
    division: str
    segments: int
    entries: int
    worst_lsb: float
    mean_lsb: float


@dataclass(frozen=True)
class OpFact:
    """One op of the Program. Scales are None for float32 and int32 values.

    ``call`` counts the calls of a module that is called several times, from 1; it is 0 otherwise.
    """

    name: str
    module: str
    kind: str
    dtype: str
    scale: float | None
    inputs: tuple[str, ...]
    input_scales: tuple[float | None, ...]
    is_output: bool = False
    acc_bound: int | None = None
    weight: WeightFact | None = None
    table: TableFact | None = None
    call: int = 0

    @property
    def where(self) -> str:
        """The name that means this op in params.yaml."""
        return match_name(self.name, self.module, self.call)

    @property
    def title(self) -> str:
        """Name for people, with the call number of a shared module."""
        return call_title(self.name, self.module, self.call)


def program_facts(program: Program) -> tuple[OpFact, ...]:
    """One fact per op that computes something, in execution order; ``quantize`` and ``dequantize`` are left out."""
    ends, calls = _output_producers(program), calls_of_shared(program.ops)
    return tuple(
        _fact(program, op, ends, calls.get(op.name, (0, 0))[0])
        for op in program.ops
        if op.kind not in ("quantize", "dequantize")
    )


def _output_producers(program: Program) -> set[str]:
    """Values that leave the Program, seen through the ``dequantize`` behind them."""
    ends = set(program.outputs)
    return ends | {op.inputs[0] for op in program.ops if op.kind == "dequantize" and op.output in ends}


def _fact(program: Program, op: Op, ends: set[str], call: int) -> OpFact:
    value = program.values[op.output]
    bound = op.attrs.get("acc_bound")
    return OpFact(
        name=op.name,
        module=op.module,
        kind=op.kind,
        dtype=value.qtype.dtype,
        scale=value.qtype.scale,
        inputs=op.inputs,
        input_scales=tuple(v.qtype.scale for v in program.in_values(op)),
        is_output=op.output in ends,
        acc_bound=None if bound is None else int(bound),
        weight=_weight(program, op) if op.kind in ("conv", "conv_transpose", "linear") else None,
        table=_table(program, op) if op.kind == "table" else None,
        call=call,
    )


def _weight(program: Program, op: Op) -> WeightFact:
    codes = program.constant(op, "weight").reshape(program.constant(op, "weight").shape[0], -1)
    dead = (codes == 0).all(dim=1).nonzero().flatten().tolist()
    dtype = str(program.constant(op, "weight").dtype).removeprefix("torch.")
    return WeightFact(int(codes.shape[0]), tuple(dead), _weight_scales(program, op), dtype)


def _table(program: Program, op: Op) -> TableFact:
    stored, (x,) = op.attrs["table"], program.in_values(op)
    return TableFact(
        function=op.attrs["function"],
        input_dtype=x.qtype.dtype,
        division=stored["division"],
        segments=stored["segments"],
        entries=stored["entries"],
        worst_lsb=stored["worst_lsb"],
        mean_lsb=stored["mean_lsb"],
    )


def _weight_scales(program: Program, op: Op) -> tuple[float, ...] | None:
    """``s_w[c]``, from ``r[c] = s_x s_w[c] / s_y`` (requantized) or ``S[c] = s_x s_w[c]`` (high precision)."""
    s_x = program.values[op.inputs[0]].qtype.scale
    s_y = program.values[op.output].qtype.scale
    if s_x is None:
        return None
    if "multiplier" in op.consts and s_y is not None:
        multiplier = program.constant(op, "multiplier").double().numpy()
        factor = np.ldexp(multiplier, -program.constant(op, "shift").int().numpy())
        return tuple((factor * s_y / s_x).tolist())
    for reader in program.ops:
        if reader.kind == "dequantize" and reader.inputs == (op.output,) and "scale" in reader.consts:
            return tuple((program.constant(reader, "scale").double().flatten() / s_x).tolist())
    return None
