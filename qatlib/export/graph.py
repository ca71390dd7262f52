"""Nodes, constants and names of an ONNX graph under construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qatlib.program import Op, Program, Value

Array = NDArray[Any]
DTYPES: dict[str, int] = {
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}


class Graph:
    """Collects what an ONNX graph consists of. A tensor is known by its name.

    The names of the Program's values are theirs alone; others are made here, from the op in progress (:attr:`scope`).
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._used = set(program.values)

    def add(self, op: Op) -> None:
        """Append the nodes of one Program op."""
        raise NotImplementedError

    def dtype(self, value: Value) -> str:
        """Dtype of the tensor that stands for ``value``."""
        return value.qtype.dtype

    def node(self, op_type: str, *inputs: str, output: str | None = None, **attrs: Any) -> str:
        """Append a node with one output and return that output's name; ``output`` is the name of a Program value."""
        name = output or self._fresh(f"{self.scope}/{op_type}")
        self._append(op_type, inputs, (name,), attrs)
        return name

    def node_outputs(self, op_type: str, *inputs: str, count: int, **attrs: Any) -> tuple[str, ...]:
        """Append a node with ``count`` outputs (Split, TopK) and return their names."""
        names = tuple(self._fresh(f"{self.scope}/{op_type}") for _ in range(count))
        self._append(op_type, inputs, names, attrs)
        return names

    def constant(self, array: Any, name: str = "constant") -> str:
        """Name of an initializer that holds ``array``; equal arrays of one dtype are stored once."""
        array = np.asarray(array, order="C")
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._fresh(name)
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def cast(self, x: str, dtype: str, output: str | None = None) -> str:
        return self.node("Cast", x, output=output, to=DTYPES[dtype])

    def pad(self, x: str, padding: Sequence[Sequence[int]], value: Any) -> str:
        """Pad the spatial axes of ``x`` ``[N, C, *in]`` by (before, after); ``value`` is a NumPy scalar of its dtype.

        ONNX Runtime pads int8, int32 and floats, but no int16.
        """
        if not any(size for pair in padding for size in pair):
            return x
        pads = [0, 0, *(before for before, _ in padding), 0, 0, *(after for _, after in padding)]
        return self.node("Pad", x, self.constant(np.array(pads)), self.constant(value))

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """``x`` with ``shape``, in which one size may be -1."""
        return self.node("Reshape", x, self.constant(np.array(shape, dtype=np.int64)))

    def _append(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], attrs: dict[str, Any]) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=self._fresh(f"{outputs[0]}:"), **attrs))

    def _fresh(self, wanted: str) -> str:
        """``wanted``, or with the first number behind it that makes it new."""
        name, count = wanted, 1
        while name in self._used:
            count += 1
            name = f"{wanted}_{count}"
        self._used.add(name)
        return name
