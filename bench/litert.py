"""The int8 kernels of LiteRT on the operators of a Program: its flatbuffer, written without TensorFlow.

Fast and not exact: LiteRT rounds otherwise (Jacob et al., 2018), and its sets of kernels differ from each other. Only
the time is compared. Two liberties, both in its favour: spatial padding is its own ``SAME``, as in a net made for it,
and a convolution that ends in an add writes what it adds in the format of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor

from qatlib.program import Op, Program, Value

Array = np.ndarray[Any, Any]
_TYPES = {
    np.dtype("float32"): schema.TensorType.FLOAT32,
    np.dtype("int8"): schema.TensorType.INT8,
    np.dtype("int32"): schema.TensorType.INT32,
}


def litert(program: Program, x: Tensor, threads: int) -> Callable[[], Sequence[Tensor]] | None:
    """The Program's operators under LiteRT's default kernels for the batch ``x``; None if one has no counterpart."""
    if any(op.kind not in _WRITERS for op in program):
        return None
    interpreter = Interpreter(model_content=_Writer(program, len(x)).model(), num_threads=threads)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run() -> list[Tensor]:
        interpreter.set_tensor(source, _channels_last(x.numpy()))
        interpreter.invoke()
        return [torch.from_numpy(interpreter.get_tensor(target))]

    return run


class _Writer:
    """One flatbuffer: tensors are numbered as they are met, images lie in NHWC order."""

    def __init__(self, program: Program, batch: int) -> None:
        self.program, self.batch = program, batch
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators, self.graph.name = [], [], "main"
        self.buffers, self.codes = [schema.BufferT()], list[Any]()
        self.index = {name: self.value(program.values[name]) for name in program.inputs}
        for op in program:
            _WRITERS[op.kind](self, op)
        self.graph.inputs = [self.index[name] for name in program.inputs]
        self.graph.outputs = [self.index[name] for name in program.outputs]

    def model(self) -> bytes:
        """The file, as LiteRT reads it."""
        model = schema.ModelT()
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [self.graph], self.buffers, self.codes
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    # -- tensors ---------------------------------------------------------------------------------------------------

    def value(self, value: Value) -> int:
        sizes = value.sizes(self.batch)
        shape = (sizes[0], *sizes[2:], sizes[1]) if len(sizes) == 4 else sizes
        dtype = np.dtype(value.qtype.dtype if value.qtype.dtype == "float32" else "int8")
        return self._tensor(value.name, shape, dtype, [value.qtype.scale] if value.qtype.scale else [])

    def constant(self, name: str, content: Array, scales: Sequence[float] = (), axis: int = 0) -> int:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(content).tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self._tensor(name, content.shape, content.dtype, scales, len(self.buffers) - 1, axis)

    def _tensor(
        self, name: str, shape: Sequence[int], dtype: np.dtype[Any], scales: Sequence[float], buffer: int = 0,
        axis: int = 0,
    ) -> int:  # fmt: skip
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), _TYPES[dtype], buffer
        if scales:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = [float(scale) for scale in scales]
            tensor.quantization.zeroPoint = [0] * len(scales)
            tensor.quantization.quantizedDimension = axis
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def scale(self, name: str) -> float:
        scale = self.program.values[name].qtype.scale
        assert scale is not None
        return scale

    # -- operators -------------------------------------------------------------------------------------------------

    def emit(self, name: str, inputs: Sequence[int], output: int, **options: Any) -> None:
        """Add the builtin operator ``name`` (``CONV_2D``) with the fields of its options table."""
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), _VERSIONS.get(name, 1)
        self.codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = len(self.codes) - 1, list(inputs), [output]
        if options:
            table = options.pop("table")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, table)
            operator.builtinOptions = getattr(schema, f"{table}T")()
            for field, setting in options.items():
                setattr(operator.builtinOptions, field, setting)
        self.graph.operators.append(operator)


_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "ADD": 2, "MAX_POOL_2D": 2,
             "AVERAGE_POOL_2D": 2, "CONCATENATION": 2, "DEQUANTIZE": 2}  # fmt: skip
"""First version of each operator that takes int8, per channel where there are weights."""


def _channels_last(x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def _activation(op: Op) -> int:
    kind = schema.ActivationFunctionType
    return int(kind.RELU if op.attrs.get("lo") == 0 else kind.NONE)


def _window(op: Op) -> dict[str, Any]:
    same = any(pad for pads in op.attrs["padding"] for pad in pads)
    rows, columns = op.attrs["stride"]
    return {
        "padding": schema.Padding.SAME if same else schema.Padding.VALID,
        "strideH": rows,
        "strideW": columns,
    }


def _weight_scales(writer: _Writer, op: Op, out_scale: float) -> Array:
    """Scale of each output channel, from the multiplier ``s_x * s_w / s_out``."""
    program = writer.program
    multiplier, shift = (program.constant(op, role).double() for role in ("multiplier", "shift"))
    return np.asarray(multiplier * torch.exp2(-shift) * out_scale / writer.scale(op.inputs[0]))


def _conv(writer: _Writer, op: Op) -> None:
    program, groups = writer.program, op.attrs["groups"]
    weight, bias = (program.constant(op, role).numpy() for role in ("weight", "bias"))
    scales = _weight_scales(writer, op, writer.scale(op.output)).tolist()
    depthwise = groups > 1
    assert groups in (1, len(weight)), "grouped convolutions that are not depthwise have no int8 kernel"
    order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
    name = op.output
    inputs = [
        writer.index[op.inputs[0]],
        writer.constant(f"{name}.weight", weight.transpose(order), scales, 3 if depthwise else 0),
        writer.constant(f"{name}.bias", bias.astype(np.int32)),
    ]
    out, added = writer.value(program.values[name]), len(op.inputs) > 1
    activation = 0 if added else _activation(op)
    settings = {**_window(op), "fusedActivationFunction": activation, "dilationHFactor": 1, "dilationWFactor": 1}
    if depthwise:
        settings["depthMultiplier"] = 1
        writer.emit("DEPTHWISE_CONV_2D", inputs, out, table="DepthwiseConv2DOptions", **settings)
    else:
        writer.emit("CONV_2D", inputs, out, table="Conv2DOptions", **settings)
    if added:
        total = writer.value(program.values[name])
        writer.emit("ADD", [out, writer.index[op.inputs[1]]], total, table="AddOptions",
                    fusedActivationFunction=_activation(op))  # fmt: skip
        out = total
    writer.index[name] = out


def _linear(writer: _Writer, op: Op) -> None:
    """A linear at the output: LiteRT has no int32 result, so it is rounded to the int8 that holds its bound."""
    program = writer.program
    after = next(reader for reader in program if op.output in reader.inputs)
    units = program.constant(after, "scale").double().flatten()
    scales = (units / writer.scale(op.inputs[0])).tolist()
    weight, bias = (program.constant(op, role).numpy() for role in ("weight", "bias"))
    out_scale = float(units.max()) * op.attrs["acc_bound"] / 127
    shape = program.values[op.output].sizes(writer.batch)
    out = writer._tensor(op.output, shape, np.dtype("int8"), [out_scale])
    inputs = [
        writer.index[op.inputs[0]],
        writer.constant(f"{op.output}.weight", weight, scales),
        writer.constant(f"{op.output}.bias", bias.astype(np.int32)),
    ]
    writer.emit("FULLY_CONNECTED", inputs, out, table="FullyConnectedOptions", fusedActivationFunction=0)
    writer.index[op.output] = out


def _pool(writer: _Writer, op: Op) -> None:
    rows, columns = op.attrs["kernel"]
    name = "MAX_POOL_2D" if op.kind == "max_pool" else "AVERAGE_POOL_2D"
    out = writer.index[op.output] = writer.value(writer.program.values[op.output])
    writer.emit(name, [writer.index[op.inputs[0]]], out, table="Pool2DOptions", **_window(op), filterHeight=rows,
                filterWidth=columns)  # fmt: skip


def _cat(writer: _Writer, op: Op) -> None:
    """Along the channels, which are last there; every part is first brought to the format of the result."""
    values = writer.program.values
    out = writer.index[op.output] = writer.value(values[op.output])
    parts = []
    for name in op.inputs:
        part = writer.index[name]
        if values[name].qtype != values[op.output].qtype:
            part = writer.value(replace(values[name], qtype=values[op.output].qtype))
            writer.emit("QUANTIZE", [writer.index[name]], part)
        parts.append(part)
    writer.emit("CONCATENATION", parts, out, table="ConcatenationOptions", axis=3)


def _reshape(writer: _Writer, op: Op) -> None:
    value = writer.program.values[op.output]
    out = writer.index[op.output] = writer.value(value)
    sizes = writer.constant(f"{op.output}.shape", np.array(value.sizes(writer.batch), np.int32))
    writer.emit("RESHAPE", [writer.index[op.inputs[0]], sizes], out)


def _quantize(writer: _Writer, op: Op) -> None:
    out = writer.index[op.output] = writer.value(writer.program.values[op.output])
    writer.emit("QUANTIZE", [writer.index[op.inputs[0]]], out)


def _dequantize(writer: _Writer, op: Op) -> None:
    out = writer.index[op.output] = writer.value(writer.program.values[op.output])
    writer.emit("DEQUANTIZE", [writer.index[op.inputs[0]]], out)


_WRITERS: dict[str, Callable[[_Writer, Op], None]] = {
    "conv": _conv, "linear": _linear, "max_pool": _pool, "avg_pool": _pool, "cat": _cat, "reshape": _reshape,
    "quantize": _quantize, "dequantize": _dequantize,
}  # fmt: skip
