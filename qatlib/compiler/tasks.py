"""What the accelerator has to do for each op, as far as it does not depend on where maps live: facts and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from torch import Tensor

import qatlib.ops  # noqa: F401  (fills the registry)
from qatlib.compiler.blocks import Cut, cut_array, cut_vector
from qatlib.compiler.hardware import fill
from qatlib.compiler.spans import Unit
from qatlib.compiler.streams import Order, Stream, encoded
from qatlib.compiler.target import Target
from qatlib.ops.base import BY_KIND
from qatlib.ops.work import Size, Work, size_of
from qatlib.program import Op, Program
from qatlib.qtype import BYTES

Engine = Literal["array", "vector"]


@dataclass(frozen=True)
class Map:
    """A feature map as it is stored; ``brick``: in pieces of some channels of a row, else channels last."""

    name: str
    size: Size
    element_bytes: int
    brick: bool
    stored_bytes: int


@dataclass(frozen=True)
class Task:
    """One pass of the accelerator over an op's maps.

    Args:
        unit: that of the target which computes it; the vector unit does what follows the array.
        work: its shape; ``dtype`` is the widest that it multiplies, of other work the widest that it reads.
        source: the map that is read block by block; ``beside``: those read once, an addend or the second factor.
        weights: elements of the weights, of ``weight_bytes`` each; ``constant_bytes`` are those of other constants.
        stream: the weights as they are stored, where the target compresses them.
        vector_ops: operations on single elements, where the vector unit or one beside it does the work.
        rate: elements a cycle of what follows the array, or of the unit that does the work.
    """

    op: Op
    work: Work
    engine: Engine
    unit: Unit
    dtype: str
    source: Map | None
    beside: tuple[Map, ...]
    target: Map
    macs: int
    vector_ops: int
    weights: int
    weight_bytes: int
    constant_bytes: int
    rate: float
    cut: Cut
    stream: Stream | None = field(default=None, compare=False, repr=False)

    @property
    def inputs(self) -> tuple[Map, ...]:
        return (*((self.source,) if self.source else ()), *self.beside)


def mac_dtype(op: Op, program: Program) -> str:
    """The wider dtype of what a conv, linear or matmul multiplies."""
    if "weight" in op.consts:
        weight = str(program.constant(op, "weight").dtype).removeprefix("torch.")
        return widest((program.values[op.inputs[0]].qtype.dtype, weight))
    return widest(value.qtype.dtype for value in program.in_values(op))


def widest(dtypes: Iterable[str]) -> str:
    return max(dtypes, key=lambda dtype: BYTES[dtype])


def order_of(weight: Tensor, work: Work, cut: Cut, target: Target) -> Order:
    """How the array takes ``weight``; a section has the output channels of the smallest block, or whole groups."""
    outputs = len(weight)
    group = outputs // work.times
    phases = work.ofm[2] // group  # of a transposed convolution: outputs of the array for one of the op
    granule = max(1, target.buffers.block_channels // phases)
    alike = outputs // work.ifm[2] if work.own_channel else group  # outputs of the same inputs
    return Order(
        section=granule if alike == outputs else max(1, granule // alike) * alike,
        group=group,
        tile=max(1, cut.tile[2] // phases),
        pass_inputs=cut.step.pass_channels or cut.step.channels,
        inputs=cut.step.channels,
        taps=cut.step.taps,
    )


class Tasks:
    """Describes ops of ``program``; ``boundary`` are the values that enter and leave the accelerator.

    ``blocks`` of outputs by the names of ops on the array replace those that read the least.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        boundary: frozenset[str],
        blocks: Mapping[str, Size] = MappingProxyType({}),
    ) -> None:
        self._program, self._target, self._boundary, self._blocks = program, target, boundary, blocks
        self._cuts: dict[tuple[object, ...], Cut] = {}

    def of(self, op: Op) -> tuple[Task, ...]:
        """The passes of one op in order: one, or two where a map has to be added in a pass of its own."""
        task = self._task(op)
        if task.work.form != "sums" or not task.beside or task.work.factor is not None:
            return (task,)
        if self._target.vector_unit.second_operand:
            return (task,)
        size = task.work.ofm
        add = Work("elements", size, size, operation="add")
        elements, rate = self._program.values[op.output].elements(), self._rate(op, add, "vector")
        later = replace(
            task, work=add, engine="vector", unit="vector", source=task.target, macs=0, weights=0, constant_bytes=0,
            vector_ops=elements, rate=rate, cut=self._cut(add, "vector", 2), stream=None,
        )  # fmt: skip
        return replace(task, beside=(), vector_ops=0), later

    def is_view(self, op: Op) -> bool:
        """Whether the op only looks at the bytes of its input in another shape."""
        return BY_KIND[op.kind].work(op, self._program).form == "view"

    def map(self, name: str) -> Map:
        """How the value of that name is stored."""
        value, target = self._program.values[name], self._target
        rows, columns, channels = size_of(value)
        brick = target.brick_channels > 1 and name not in self._boundary
        filled = fill(channels, target.brick_channels) if brick else channels
        stored = fill(rows * columns * filled * value.qtype.bytes, target.sram.alignment)
        return Map(name, (rows, columns, channels), value.qtype.bytes, brick, stored)

    def _task(self, op: Op) -> Task:
        program, operator = self._program, BY_KIND[op.kind]
        work, cost = operator.work(op, program), operator.cost(op, program)
        unit = self._unit(work)
        engine: Engine = "array" if unit == "array" else "vector"
        maps = [self.map(name) for name in op.inputs]
        weight = program.constant(op, "weight") if "weight" in op.consts and work.form == "sums" else None
        others = cost.weight_bytes if weight is None and work.form not in ("resize", "warp") else 0
        cut = self._cut(work, engine, len(maps), self._blocks.get(op.name))
        if unit == "table" and self._target.table_unit and self._target.table_unit.tables_from == "unit":
            others = 0
        return Task(
            op=op,
            work=work,
            engine=engine,
            unit=unit,
            dtype=mac_dtype(op, program) if cost.macs else widest(v.qtype.dtype for v in program.in_values(op)),
            source=maps[0] if maps else None,
            beside=tuple(maps[1:]),
            target=self.map(op.output),
            macs=cost.macs,
            vector_ops=cost.vector_ops,
            weights=0 if weight is None else weight.numel(),
            weight_bytes=0 if weight is None else weight.element_size(),
            constant_bytes=others,
            rate=self._rate(op, work, unit),
            cut=cut,
            stream=None if weight is None else self._stream(weight, work, cut),
        )

    def _stream(self, weight: Tensor, work: Work, cut: Cut) -> Stream | None:
        if not self._target.weights.compression:
            return None
        return encoded(weight, order_of(weight, work, cut, self._target))

    def _unit(self, work: Work) -> Unit:
        """Tables, resizing and warping have units of their own, if the target has them.

        Windows, and what reads one map element by element, also run on an array that has a way for them.
        """
        target = self._target
        if work.form == "sums":
            return "array"
        if work.operation == "table" and target.table_unit is not None:
            return "table"
        if work.form == "resize" and target.resize_unit is not None:
            return "resize"
        if work.form == "warp" and target.warp_unit is not None:
            return "warp"
        alone = work.form in ("copy", "windows") or (work.form == "elements" and work.ifm == work.ofm)
        return "array" if (alone or work.form == "resize") and target.mac_array.windows else "vector"

    def _rate(self, op: Op, work: Work, unit: Unit) -> float:
        target, program = self._target, self._program
        own = {"resize": target.resize_unit, "warp": target.warp_unit}.get(unit)
        if own is not None:
            return own.elements_per_cycle
        if unit == "table" and target.table_unit is not None:
            lookups = target.table_unit.rate(program.in_values(op)[0].qtype.dtype)
            assert lookups is not None, "a Target has a rate of lookups for every dtype that its tables read"
            return lookups
        after = work.form == "sums" or work.operation == ""
        read = program.in_values(op)[1:] if work.form == "sums" else program.in_values(op)
        values = [program.values[op.output], *read]
        rate = target.vector_unit.elements_per_cycle.of(widest(value.qtype.dtype for value in values))
        assert rate is not None, "a Target has a vector rate for every dtype that its ops allow"
        return rate if after else min(rate, target.vector_unit.operations.get(work.operation, rate))

    def _cut(self, work: Work, engine: Engine, operands: int, block: Size | None = None) -> Cut:
        """Equal work is cut once."""
        key = (work, engine, operands, block)
        if key not in self._cuts:
            if engine == "array":
                self._cuts[key] = cut_array(work, self._target, block)
            else:
                self._cuts[key] = cut_vector(work, self._target, operands, block)
        return self._cuts[key]
