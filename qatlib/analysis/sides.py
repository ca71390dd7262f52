"""The two kinds of model a capture can run, behind one face: fake-quant (or its float view) and integer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qatlib.analysis.accumulators import SaturationGauge, may_saturate
from qatlib.analysis.pieces import Coded
from qatlib.analysis.records import Saturation
from qatlib.fake.straight_through import round_into
from qatlib.program import Op, Program
from qatlib.qtype import FLOAT, INT32, QType

Step = tuple[str, tuple[Tensor, ...], Tensor]
"""Name of a node, its real-valued inputs and its real-valued output."""
Output = Tensor | Coded
"""Real numbers of a node's output, as they are or as codes."""


class UnmeasurableError(Exception):
    """An op has no same-input counterpart; the message says why. Never reaches a user."""


class FakeModel(Protocol):
    """The part of :class:`qatlib.fake.model.FakeQuantModel` that analysis uses."""

    graph: Any

    def steps(self, *inputs: Tensor) -> Iterator[Any]: ...
    def float_steps(self, *inputs: Tensor) -> Iterator[Any]: ...
    def compute(self, name: str, *inputs: Tensor) -> Tensor: ...
    def qtype(self, name: str) -> QType: ...


class Runner(Protocol):
    """The part of :class:`qatlib.emulator.Emulator` that analysis uses."""

    program: Program

    def steps(self, *inputs: Tensor) -> Iterator[Any]: ...
    def compute(self, op: Op, *codes: Tensor) -> Tensor: ...
    def real(self, value_name: str, codes: Tensor) -> Tensor: ...
    def codes(self, value_name: str, real: Tensor) -> Tensor: ...


class Reference(Protocol):
    """The model that a capture measures against: run node by node."""

    def steps(self, inputs: Sequence[Tensor]) -> Iterator[Step]: ...

    def grid(self, name: str) -> QType:
        """The format of which all outputs of ``name`` are values; FLOAT if it is not known to be one."""
        ...


class Other(Protocol):
    """The model that a capture measures: names and outputs of its nodes, one by one, and single nodes.

    ``same_input`` raises :class:`UnmeasurableError` where it cannot.
    """

    def outputs(self, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Output]]: ...
    def same_input(self, name: str, sources: Sequence[str], inputs: Sequence[Tensor]) -> Output: ...
    def qtype(self, name: str) -> QType: ...

    def absent(self, name: str) -> str:
        """Why ``name`` has no counterpart here; empty if it has one."""
        ...


class FloatSide:
    """A FakeQuantModel in CALIBRATION state: the float model, as reference. Its observers see nothing."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model

    def steps(self, inputs: Sequence[Tensor]) -> Iterator[Step]:
        return ((node.name, given, output) for node, given, output in self.model.float_steps(*inputs))

    def grid(self, name: str) -> QType:
        return FLOAT


class FakeSide:
    """A FakeQuantModel, as reference or as the one measured."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self._names = {node.name for node in model.graph.nodes}

    def steps(self, inputs: Sequence[Tensor]) -> Iterator[Step]:
        return ((node.name, given, output) for node, given, output in self.model.steps(*inputs))

    def grid(self, name: str) -> QType:
        qtype = self.model.qtype(name)
        return qtype if qtype.dtype in ("int8", "int16") else FLOAT

    def outputs(self, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        return ((node.name, output) for node, _, output in self.model.steps(*inputs))

    def same_input(self, name: str, sources: Sequence[str], inputs: Sequence[Tensor]) -> Tensor:
        """Output of one op when nodes ``sources`` hold ``inputs`` (real), each first brought to this model's format."""
        given = [fake_quantize(x, self.qtype(source)) for source, x in zip(sources, inputs, strict=True)]
        return self.model.compute(name, *given)

    def qtype(self, name: str) -> QType:
        return self.model.qtype(name)

    def absent(self, name: str) -> str:
        return "" if name in self._names else "the other model has no node of this name"


class IntegerSide:
    """A Program, whose values bear the node names of the fake-quant model that it was converted from."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.program = runner, runner.program
        self._producer = {op.output: op for op in self.program.ops}
        accumulators = {op.inputs[0] for op in self.program.ops if op.kind == "dequantize"}
        self._whole = {n for n, v in self.program.values.items() if v.qtype == INT32 and n not in accumulators}
        self._gauges = {op.name: SaturationGauge(op, self.program) for op in self.program.ops if may_saturate(op)}

    def outputs(self, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Output]]:
        for op, given, output in self.runner.steps(*inputs):
            if op.name in self._gauges:
                self._gauges[op.name].add(given)
            yield op.output, self._real(op.output, output)

    def saturations(self) -> tuple[Saturation, ...]:
        """What the accumulators that may saturate met in the batches so far."""
        return tuple(gauge.result() for gauge in self._gauges.values())

    def _real(self, name: str, carrier: Tensor) -> Output:
        """Real numbers of a value; integers without a scale as they are."""
        scale = self.qtype(name).scale
        if scale is not None:
            return Coded(carrier, scale)
        return carrier.double() if name in self._whole else self.runner.real(name, carrier)

    def same_input(self, name: str, sources: Sequence[str], inputs: Sequence[Tensor]) -> Output:
        """Output of the op, or ops, behind node ``name`` when nodes ``sources`` hold ``inputs`` (real-valued)."""
        known: dict[str, Tensor] = {}
        for source, tensor in zip(sources, inputs, strict=True):
            if source in self._whole:
                known[source] = tensor.double()
            elif self.qtype(source).dtype == "int32":
                raise UnmeasurableError(f"reads the int32 accumulator {source!r}, which nothing quantizes to")
            elif source in self.program.values:
                known[source] = self.runner.codes(source, tensor)
        return self._real(name, self._evaluate(name, known))

    def _evaluate(self, value: str, known: dict[str, Tensor]) -> Tensor:
        if value not in known:
            op = self._producer.get(value)
            if op is None:
                raise UnmeasurableError(f"the Program computes it from {value!r}, which is no input of this node")
            known[value] = self.runner.compute(op, *(self._evaluate(source, known) for source in op.inputs))
        return known[value]

    def qtype(self, name: str) -> QType:
        value = self.program.values.get(name)
        return FLOAT if value is None else value.qtype

    def absent(self, name: str) -> str:
        return "" if name in self.program.values else "the Program has no value of this name (fused into another op)"


def fake_quantize(tensor: Tensor, qtype: QType) -> Tensor:
    """Round to the codes of ``qtype`` and back to reals; a format without a scale leaves the tensor as it is."""
    if qtype.scale is None:
        return tensor
    x = tensor.float()
    return round_into(torch.empty_like(x), x, torch.tensor(qtype.scale, device=x.device), qtype.limits, None)
