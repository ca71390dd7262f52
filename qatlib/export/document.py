"""The ONNX document of a Program: inputs, outputs, metadata, checked and written whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from qatlib.atomic import write_bytes
from qatlib.emulator import Emulator
from qatlib.errors import ProgramError
from qatlib.export.graph import DTYPES, Graph
from qatlib.export.integer import IntegerGraph
from qatlib.export.qdq import QdqGraph
from qatlib.program import Program, Value

Flavour = Literal["integer", "qdq"]
FLAVOURS: Mapping[str, Callable[[Program], Graph]] = {"integer": IntegerGraph, "qdq": QdqGraph}
SCHEMA = 1
"""Version of the metadata."""
OPSET = 21
"""ONNX Runtime 1.18 and later run it."""
OLDEST_OPSET = {"integer": 18, "qdq": 21}
"""ReduceMax and ReduceMin read their axes as an input from 18 on. QuantizeLinear has int16 from 21 on; before, ONNX
Runtime 1.32 moves a Transpose out of DequantizeLinear as uint8."""
LARGEST_CONSTANTS = 2**31 - 2**24
"""Bytes: a protobuf message ends at 2 GiB, of which nodes and names get 16 MiB."""


def export_onnx(program: Program, path: str | Path, flavour: Flavour = "integer", opset: int = OPSET) -> ModelProto:
    """Write ``program`` as an ONNX document and return it.

    ``integer`` gives the Program's integers under every runtime that keeps to the standard; ``qdq`` is for runtimes
    that fuse QuantizeLinear and DequantizeLinear into int8 kernels, and comes close. ``docs/export.md`` says more.

    Raises ProgramError: QAT220 for an op without a form in that flavour or a document beyond 2 GiB, QAT221 for a path
    that cannot be written, QAT223 for an unknown flavour or opset, QAT224 if the document is not valid ONNX. The file
    appears whole or not at all.
    """
    model = to_onnx(program, flavour, opset)
    try:
        write_bytes(path, model.SerializeToString())
    except OSError as error:
        raise ProgramError(
            "QAT221", str(path), f"cannot be written ({error.strerror})", "Name a file in a folder that can be written"
        ) from None
    return model


def to_onnx(program: Program, flavour: Flavour = "integer", opset: int = OPSET) -> ModelProto:
    """The document that :func:`export_onnx` writes."""
    _check_request(flavour, opset)
    program = program.to("cpu")
    Emulator(program)  # refuses what has no exact integer form
    graph = FLAVOURS[flavour](program)
    for op in program:
        graph.add(op)
    _check_size(graph.initializers)
    names = dict.fromkeys(program.outputs)
    inner = [name for name in program.values if name not in names and name not in program.inputs]
    infos = {name: _value_info(value, graph.dtype(value)) for name, value in program.values.items()}
    body = helper.make_graph(
        graph.nodes,
        "program",
        [infos[name] for name in program.inputs],
        [infos[name] for name in names],
        graph.initializers,
        value_info=[infos[name] for name in inner],
    )
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        body,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="qatlib",
        producer_version=version("qatlib"),
    )
    helper.set_model_props(model, _metadata(program, flavour))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).splitlines()[0]
        raise ProgramError("QAT224", flavour, f"is not valid ONNX ({first})", "A defect: please report it") from None
    return model


def _value_info(value: Value, dtype: str) -> ValueInfoProto:
    """Name, dtype and shape of a value; the batch is the symbolic size ``batch``."""
    shape = [size if size >= 0 else "batch" if size == -1 else f"{-size}*batch" for size in value.shape]
    return helper.make_tensor_value_info(value.name, DTYPES[dtype], shape)


def _check_request(flavour: str, opset: int) -> None:
    if flavour not in FLAVOURS:
        raise ProgramError("QAT223", "flavour", f"is {flavour!r}", f"Use one of {', '.join(FLAVOURS)}")
    oldest, newest = OLDEST_OPSET[flavour], onnx.defs.onnx_opset_version()
    if not oldest <= opset <= newest:
        raise ProgramError("QAT223", "opset", f"is {opset}", f"The flavour {flavour} can use {oldest} to {newest}")


def _check_size(constants: Sequence[TensorProto]) -> None:
    size = sum(math.prod(c.dims) * helper.tensor_dtype_to_np_dtype(c.data_type).itemsize for c in constants)
    if size > LARGEST_CONSTANTS:
        seen = f"has {size / 2**30:.2f} GiB of constants; an ONNX document ends at 2 GiB"
        raise ProgramError("QAT220", "document", seen, "Export a network with fewer weights, or parts of this one")


def _metadata(program: Program, flavour: Flavour) -> dict[str, str]:
    """What the document says of itself. Scales are those of the int8 and int16 tensors, by name."""
    scales = {name: value.qtype.scale for name, value in program.values.items() if value.qtype.scale is not None}
    return {
        "qatlib.schema": str(SCHEMA),
        "qatlib.version": version("qatlib"),
        "qatlib.flavour": flavour,
        "qatlib.scales": json.dumps(scales),
        "qatlib.float_islands": json.dumps([op.name for op in program.islands()]),
    }
