"""FakeQuantModel → Program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import treespec_dumps

from qatlib.emulator import Emulator
from qatlib.errors import ProgramError, StateError
from qatlib.fake.model import FakeOp, FakeQuantModel
from qatlib.fake.state import FakeQuantState
from qatlib.graph.ir import OPAQUE
from qatlib.lowering import Emitter, Lowering
from qatlib.ops.base import BY_NAME
from qatlib.program import Program, Value, verify
from qatlib.qtype import FLOAT, INT32, QType

DEFAULT_MULTIPLIER_BITS = 20


def to_program(
    model: FakeQuantModel, preserve: Iterable[str] = (), multiplier_bits: int = DEFAULT_MULTIPLIER_BITS
) -> Program:
    """Integer Program of a calibrated or trained model.

    Args:
        preserve: names of ops that stay in fake-quant form, besides those marked by ``set_preserve_qat_mode``.
        multiplier_bits: bits of the requantization multipliers, 8 to 21.

    Raises StateError (QAT151) unless the model is in VALIDATION; ProgramError QAT170, QAT171, QAT175.
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
    kept = set(preserve)
    unknown = kept - {name for name, _ in model.ops()}
    if unknown:
        raise ProgramError(
            "QAT170", f"preserve {sorted(unknown)[0]!r}", "no op has this name", "Use a name from print(model)"
        )
    emitter = Emitter()
    graph = model.graph
    for node in graph.nodes:
        if node.name in graph.inputs:
            emitter.add_value(Value(node.name, node.shape, FLOAT), (0, 0))
    for name, fake in model.ops():
        if name in kept or fake.preserve_qat_mode:
            _preserve(emitter, model, name, fake)
        else:
            _convert(emitter, model, name, fake, multiplier_bits)
    outputs = tuple(_dequantized(emitter, name) for name in graph.outputs)
    meta = {
        "multiplier_bits": multiplier_bits,
        "trained": model.trained,
        "output_structure": treespec_dumps(graph.structure),
    }
    return verify(Program(graph.inputs, outputs, tuple(emitter.ops), emitter.values, emitter.constants, meta))


def _convert(emitter: Emitter, model: FakeQuantModel, name: str, fake: FakeOp, bits: int) -> None:
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
    low = Lowering(emitter, fake, inputs, out, bits)
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
    inputs = tuple(_dequantized(emitter, i) if emitter.values[i].qtype.dtype == "int32" else i for i in node.inputs)
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

    def forward(self, *inputs: Tensor) -> Any:
        return self.program.nest(self._emulator(*inputs))

    def to(self, device: str | torch.device) -> IntegerModel:  # type: ignore[override]
        """Run on ``device`` from now on."""
        self._emulator = Emulator(self.program, device)
        return self


def convert_fx(model: FakeQuantModel, preserve: Iterable[str] = ()) -> IntegerModel:
    """Callable integer model of a calibrated or trained model; its Program is ``.program``."""
    return IntegerModel(to_program(model, preserve))


convert = convert_fx
