"""FakeQuantModel → Program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import treespec_dumps

from qatlib.emulator import Emulator
from qatlib.errors import ProgramError, StateError
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.op import FakeOp
from qatlib.fake.state import FakeQuantState
from qatlib.graph.inputs import in_order, without_classes
from qatlib.graph.ir import INPUT, OPAQUE
from qatlib.lowering import Emitter, Lowering
from qatlib.ops.base import BY_NAME
from qatlib.program import Program, Value, verify
from qatlib.qtype import FLOAT, INT32, QType
from qatlib.tables import DEFAULT_TABLE, TableSpec

DEFAULT_MULTIPLIER_BITS = 20


def to_program(
    model: FakeQuantModel,
    preserve: Iterable[str] = (),
    multiplier_bits: int = DEFAULT_MULTIPLIER_BITS,
    tables: Mapping[str, TableSpec] = MappingProxyType({}),
) -> Program:
    """Integer Program of a calibrated or trained model.

    Args:
        preserve: names of ops that stay in fake-quant form, besides those marked by ``set_preserve_qat_mode``. The
            name of a composite, or of a module, stands for all of its steps.
        multiplier_bits: bits of the requantization multipliers, 8 to 21.
        tables: settings of the tables of the ops named, which :func:`table_ops` lists.

    Raises StateError (QAT151) unless the model is in VALIDATION; ProgramError QAT170, QAT171, QAT175, QAT210, QAT212,
    QAT213.
    """
    if model.state is not FakeQuantState.VALIDATION:
        raise StateError(
            "QAT151",
            "convert",
            f"the model is in state {model.state.name}, so its scales are still moving",
            "Calibrate it, then set_fake_quantize(model, FakeQuantState.VALIDATION)",
        )
    if not 8 <= multiplier_bits <= 21:
        raise ProgramError("QAT170", "multiplier_bits", f"is {multiplier_bits}", "Use 8 to 21")
    kept = {name for given in preserve for name in _meant(model, given)}
    without = sorted(set(tables) - set(table_ops(model, kept)))
    if without:
        raise ProgramError("QAT170", f"tables {without[0]!r}", "no op of this name becomes a table", "See table_ops")
    emitter = Emitter()
    graph = model.graph
    for node in graph.nodes:
        if node.op == INPUT:
            qtype = model.qtype(node.name) if node.content != "float" else FLOAT
            emitter.add_value(Value(node.name, node.shape, qtype), (0, 0) if qtype.is_float else qtype.codes)
    for name, fake in model.ops():
        if name in kept or fake.preserve_qat_mode:
            _preserve(emitter, model, name, fake)
        else:
            _convert(emitter, model, name, fake, multiplier_bits, tables.get(name, DEFAULT_TABLE))
    contents = {node.name: node.content for node in graph.nodes}
    outputs = tuple(_dequantized(emitter, i) if contents[i] == "float" else i for i in graph.outputs)
    meta = {
        "multiplier_bits": multiplier_bits,
        "trained": model.trained,
        "output_structure": treespec_dumps(without_classes(graph.structure)),
    }
    return verify(Program(graph.inputs, outputs, tuple(emitter.ops), emitter.values, emitter.constants, meta))


def _meant(model: FakeQuantModel, given: str) -> list[str]:
    """The op that is named, or the ops under that name; ProgramError (QAT170) if there is none."""
    ops = dict(model.ops())
    if given in ops:
        return [given]
    inside = [
        n for n, fake in ops.items() if n.startswith(f"{given}.") and fake.node.op not in ("quantize", "dequantize")
    ]
    if not inside:
        raise ProgramError("QAT170", f"preserve {given!r}", "no op has this name", "Use a name from print(model)")
    return inside


def table_ops(model: FakeQuantModel, preserve: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the ops that become tables, unless they are in ``preserve``."""
    kept = set(preserve)
    return tuple(
        name
        for name, fake in model.ops()
        if fake.node.op in BY_NAME and "table" in BY_NAME[fake.node.op].kinds
        if not (fake.hybrid or fake.preserve_qat_mode or name in kept)
    )


def _convert(emitter: Emitter, model: FakeQuantModel, name: str, fake: FakeOp, bits: int, table: TableSpec) -> None:
    node = fake.node
    if node.op == "dequantize":
        source = node.inputs[0]
        if emitter.values[source].qtype.is_float:
            _float_op(emitter, name, fake, FLOAT, {})
        else:
            _dequantize(emitter, source, name)
        return
    if fake.hybrid:
        _float_op(emitter, name, fake, FLOAT, fake.float_params())
        return
    out = model.qtype(name)
    if out.is_float:
        out = INT32
    inputs = tuple(_dequantized(emitter, i) for i in node.inputs) if node.op == "quantize" else node.inputs
    low = Lowering(emitter, fake, inputs, out, bits, table, tuple(model.observed(i) for i in node.inputs))
    BY_NAME[node.op].lower(low)


def _preserve(emitter: Emitter, model: FakeQuantModel, name: str, fake: FakeOp) -> None:
    """The op in fake-quant form: its weights rounded to their codes, its output quantized."""
    if fake.node.op in ("quantize", "dequantize"):
        raise ProgramError("QAT170", f"preserve {name!r}", f"is a {fake.node.op}, which has no float form", "Remove it")
    _float_op(emitter, name, fake, model.qtype(name), fake.quantized_params())


def _float_op(emitter: Emitter, name: str, fake: FakeOp, out: QType, params: dict[str, Tensor]) -> None:
    node = fake.node
    if node.op == OPAQUE:
        raise ProgramError(
            "QAT175",
            node.described(),
            f"{node.module_type} is kept whole (model.leaf or model.wrap) and has no form in a Program",
            "Run it after the network's outputs, or write it with supported operators",
        )
    inputs = tuple(_dequantized(emitter, i) if i in emitter.accumulator_scales else i for i in node.inputs)
    emitter.add_op(
        "float_op",
        Value(name, node.shape, out),
        inputs,
        {"operator": node.op, "attrs": dict(node.attrs)},
        params,
        node.module,
        node.module_type.rpartition(".")[2],
    )


def _dequantized(emitter: Emitter, name: str) -> str:
    """Name of the float32 form of a value, made once."""
    if emitter.values[name].qtype.is_float:
        return name
    if f"{name}.dequant" not in emitter.values:
        _dequantize(emitter, name, f"{name}.dequant")
    return f"{name}.dequant"


def _dequantize(emitter: Emitter, source: str, name: str) -> None:
    scale = emitter.accumulator_scales.get(source)
    consts = {} if scale is None else {"scale": scale}
    shape = emitter.values[source].shape
    emitter.add_op("dequantize", Value(name, shape, FLOAT), (source,), {}, consts, "", "DeQuantStub")


# -- a callable integer model ------------------------------------------------------------------------------------------


class IntegerModel(nn.Module):
    """A Program that is called as the float model is: float tensors in and out, nested as there."""

    def __init__(self, program: Program, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.program = program
        self._emulator = Emulator(program, device)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Outputs nested as those of the float model; inputs in its order, or by name. Raises QConfigError QAT143."""
        return self.program.nest(self._emulator(*in_order(self.program.inputs, inputs, named)))

    def to(self, device: str | torch.device) -> IntegerModel:  # type: ignore[override]
        """Run on ``device`` from now on."""
        self._emulator = Emulator(self.program, device)
        return self


def convert_fx(
    model: FakeQuantModel, preserve: Iterable[str] = (), tables: Mapping[str, TableSpec] = MappingProxyType({})
) -> IntegerModel:
    """Callable integer model of a calibrated or trained model; its Program is ``.program``."""
    return IntegerModel(to_program(model, preserve, tables=tables))


convert = convert_fx
