"""Raw tensors of every op of one model on one batch, and their statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qatlib.analysis.batches import peek
from qatlib.analysis.capture import Inputs
from qatlib.analysis.parameters import Parameter, parameters_of, parameters_of_program
from qatlib.analysis.records import call_title
from qatlib.analysis.states import emulator_of
from qatlib.analysis.statistics import StatisticsTable, input_role, row_of, shown_scale, summary_of
from qatlib.conversion import IntegerModel
from qatlib.emulator import Emulator
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx, prepare_graph
from qatlib.fake.qconfig import QConfig
from qatlib.graph.calls import calls_of_shared
from qatlib.program import Op, Program
from qatlib.qtype import BOOL, FLOAT, INT32, QType


@dataclass(frozen=True, eq=False)
class RawFeature:
    """One tensor of op ``name``, which is number ``index`` in forward order; ``module`` is its title in tables.

    ``role`` is ``input`` (``input-0``, … of several), ``output`` or the name of a parameter. ``data`` holds real
    numbers, of integers and truth values these themselves; ``scales`` the step of its integers, of a weight one per
    output channel, empty for float.
    """

    index: int
    name: str
    module: str
    module_type: str
    role: str
    data: Tensor
    dtype: str
    scales: tuple[float, ...] = ()


def get_raw_features(
    model: Any,
    inputs: Inputs | Iterable[Inputs],
    leaf: Sequence[str] = (),
    wrap: Sequence[Callable[..., Any]] = (),
) -> list[RawFeature]:
    """Inputs, outputs and parameters of every op of ``model`` on the first batch of ``inputs``, in forward order.

    ``model`` is a float model, which is traced and fused (``leaf`` and ``wrap`` as in :func:`qatlib.fuse_fx`), so that
    its ops bear the names of those of its quantized forms; a FakeQuantModel in any state; or an integer model or its
    Program. It is left as it is. All tensors are kept: pass few samples. Raises GraphError for a float model that
    cannot be traced, DataError QAT118 without a batch.
    """
    if isinstance(model, Program | Emulator | IntegerModel):
        return _of_program(emulator_of(model), inputs)
    if isinstance(model, FakeQuantModel):
        return _of_fake(deepcopy(model).eval(), inputs)
    names = tuple(inspect.signature(model.forward).parameters)
    first = inputs if isinstance(inputs, Mapping) else peek(inputs, names)[1].inputs
    graph = fuse_fx(model, first, leaf, wrap)
    return _of_fake(prepare_graph(graph, lambda _: QConfig(), [node.name for node in graph.nodes]).eval(), first)


def profile_featuremap(features: Iterable[RawFeature]) -> StatisticsTable:
    """Statistics of every tensor of :func:`get_raw_features`; ``.by_range()`` has the widest first, ``.csv()`` text."""
    return StatisticsTable(
        tuple(
            row_of(f.index, f.module, f.module_type, f.role, summary_of(f.data), shown_scale(f.scales), f.dtype)
            for f in features
        )
    )


def _of_fake(model: FakeQuantModel, inputs: Any) -> list[RawFeature]:
    _, first = peek(inputs, model.graph.inputs)
    quantized = model.state.quantizes
    parameters, calls = parameters_of(model, quantized), calls_of_shared(model.graph.nodes)
    found: list[RawFeature] = []
    index = 0

    def format_of(name: str) -> QType:
        qtype = model.qtype(name)
        return qtype if quantized or qtype in (BOOL, INT32) else FLOAT

    def visit(node: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal index
        title = call_title(node.name, node.module, calls.get(node.name, (0, 0))[0])
        formats = [format_of(name) for name in (*node.inputs, node.name)]
        kind = node.op if node.composite else node.module_type
        found.extend(_features(index, node.name, title, kind, (*given, output), formats, parameters.get(node.name, ())))
        index += 1

    with torch.no_grad():
        model.walk(*first.to(model.state_code.device).inputs, visit=visit)
    return found


def _of_program(emulator: Emulator, inputs: Any) -> list[RawFeature]:
    program = emulator.program
    _, first = peek(inputs, program.inputs)
    parameters, calls = parameters_of_program(program), calls_of_shared(program.ops)
    found: list[RawFeature] = []
    index = 0

    def visit(op: Op, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal index
        title = call_title(op.name, op.module, calls.get(op.name, (0, 0))[0])
        names = (*op.inputs, op.output)
        tensors = [emulator.real(name, x).clone() for name, x in zip(names, (*given, output), strict=True)]
        formats, kind = [program.values[name].qtype for name in names], op.origin or op.kind
        found.extend(_features(index, op.name, title, kind, tensors, formats, parameters.get(op.name, ())))
        index += 1

    with torch.no_grad():
        emulator.walk(*first.to(emulator.device).inputs, visit=visit)
    return found


def _features(
    index: int,
    name: str,
    title: str,
    kind: str,
    tensors: Sequence[Tensor],
    formats: Sequence[QType],
    parameters: Sequence[Parameter],
) -> list[RawFeature]:
    """Inputs, then the output, then the parameters of one op."""
    count = len(tensors) - 1
    roles = [*(input_role(place, count) for place in range(count)), "output"]
    found = [
        RawFeature(index, name, title, kind, role, x, qtype.format, () if qtype.scale is None else (qtype.scale,))
        for role, x, qtype in zip(roles, tensors, formats, strict=True)
    ]
    found += [RawFeature(index, name, title, kind, p.role, p.values, p.dtype, p.scales) for p in parameters]
    return found
