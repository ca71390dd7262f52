"""torch model → FakeQuantModel: trace, fuse, decide every format, place the quantizers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from qatlib.errors import QConfigError
from qatlib.fake.choose import Rules, attributes_of, rules_of
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import QConfig
from qatlib.graph.fuse import DENSE
from qatlib.graph.inputs import Inputs, ordered_inputs
from qatlib.graph.ir import CONSTANT, INPUT, OPAQUE, Graph, Node
from qatlib.graph.same import check_same
from qatlib.graph.trace import trace
from qatlib.graph.verify import verify
from qatlib.ops.base import BY_NAME

Choose = Callable[[Node], QConfig]
"""The QConfig of a node; for ``quantize`` nodes (``<input>.quant``) that of a network input."""


Origin = Callable[[Node], tuple[str, str]]
"""The settings that the output and the weights of a node go by, in words."""
BY_OPERATOR = "operator"
"""Origin of the format that an inner step of a composite takes by itself."""
BY_STUB = "QuantStub"
"""Origin of a scale that the model's QuantStub fixes."""


def prepare_graph(
    graph: Graph, choose: Choose, hybrid: Iterable[str] = (), origin: Origin = lambda _: ("", "")
) -> FakeQuantModel:
    """FakeQuantModel of a fused graph, in CALIBRATION state.

    Args:
        choose: QConfig of every quantized node.
        hybrid: names of nodes that stay float.
        origin: what ``choose`` and ``hybrid`` go by, kept for the qconfig table.

    Raises QConfigError: QAT145 if an int32 output is asked for where something but the network's output reads it.
    """
    floats = _float_nodes(graph, set(hybrid))
    graph = verify(_insert_quantize(graph, floats), "insert_quantize")
    plan: dict[str, QConfig | None] = {}
    quantizes: dict[str, bool] = {}
    users = graph.users()
    for node in graph.nodes:
        if node.name in floats or node.op == INPUT:
            plan[node.name], quantizes[node.name] = None, False
            continue
        qconfig = _with_fixed_scale(node, choose(node))
        if qconfig.activation is None:
            _check_high_precision(graph, users, node)
        plan[node.name] = qconfig
        quantizes[node.name] = node.content == "float" and not BY_NAME[node.op].keeps_scale
    model = FakeQuantModel(graph, plan, quantizes)
    model.origins = {node.name: _origin(node, origin) for node in graph.nodes if node.op != INPUT}
    for node in graph.nodes:
        if plan[node.name] is not None:
            dtypes = [model.dtype(name) for name in node.inputs]
            BY_NAME[node.op].check_formats(node.described(), dtypes, model.dtype(node.name))
    return model


def is_high_precision_candidate(graph: Graph, node: Node) -> bool:
    """Whether ``node`` is a convolution or linear, nothing but batch norm fused into it, that only outputs read."""
    return _has_bare_accumulator(node) and not _inner_readers(graph, graph.users(), node)


def _has_bare_accumulator(node: Node) -> bool:
    """Whether the int32 accumulator of ``node`` is its result: no fused add or clamp comes after it."""
    return node.op in DENSE and len(node.inputs) == 1 and "clamp" not in node.attrs


def _inner_readers(graph: Graph, users: Mapping[str, list[Node]], node: Node) -> list[str]:
    inner = [user.name for user in users[node.name] if user.op != "dequantize"]
    return inner if inner or node.name in graph.outputs or users[node.name] else [node.name]


def _check_high_precision(graph: Graph, users: Mapping[str, list[Node]], node: Node) -> None:
    readers = _inner_readers(graph, users, node)
    if node.op in DENSE and readers:
        raise QConfigError(
            "QAT145",
            node.described(),
            f"output kept at 32 bit but read by {', '.join(readers)}; only the network's output may be",
            "Remove high_precision from its qconfig override, or use activation: int16",
        )
    if not _has_bare_accumulator(node):
        fused = f" with {' and '.join(node.absorbed)} fused into it" if node.absorbed else ""
        raise QConfigError(
            "QAT145",
            node.described(),
            f"high-precision output asked of {node.op}{fused}; only a conv or linear that ends in its accumulator,"
            " without add, relu or clamp, can show it",
            "Remove high_precision from its qconfig override",
        )


def _with_fixed_scale(node: Node, qconfig: QConfig) -> QConfig:
    scale = node.attrs.get("scale") if node.op == "quantize" else None
    return qconfig if scale is None else qconfig.with_activation(scale=scale)


def _origin(node: Node, origin: Origin) -> tuple[str, str]:
    output, weight = origin(node)
    fixed = node.op == "quantize" and node.attrs.get("scale") is not None
    return BY_STUB if fixed else output, weight if "weight" in node.params else ""


def _float_nodes(graph: Graph, hybrid: set[str]) -> set[str]:
    """Nodes that compute in float: hybrid and opaque ones, and everything behind a DeQuantStub up to a QuantStub."""
    constants = {node.name for node in graph.nodes if node.op == CONSTANT}
    floats, behind = hybrid - constants, set[str]()  # a constant is float where all of its readers are
    for node in graph.nodes:
        computed = set(node.inputs) - constants
        if node.op == "dequantize" or (computed and node.op != "quantize" and computed <= behind):
            behind.add(node.name)
        if node.op == OPAQUE:
            floats.add(node.name)
    floats |= behind
    users = graph.users()
    return floats | {name for name in constants if all(user.name in floats for user in users[name])}


def _insert_quantize(graph: Graph, floats: set[str]) -> Graph:
    """Put one ``quantize`` node behind every float value that a quantized op reads."""
    real = {n.name for n in graph.nodes if n.content == "float" and (n.name in floats or n.op == INPUT)}
    read = {
        name
        for node in graph.nodes
        if node.name not in floats and node.op not in (INPUT, "quantize")
        for name in node.inputs
        if name in real
    }
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name not in floats and node.op != "quantize":
            node = replace(node, inputs=tuple(f"{i}.quant" if i in read else i for i in node.inputs))
        nodes.append(node)
        if node.name in read:
            stub = "qatlib.fake.stubs.QuantStub"
            masks = {key: node.attrs[key] for key in ("below_maximum",) if key in node.attrs}
            quant = Node(f"{node.name}.quant", "quantize", (node.name,), masks, shape=node.shape, module_type=stub)
            nodes.append(quant)
    return replace(graph, nodes=tuple(nodes))


def _check_float_inputs(rules: Rules, graph: Graph, floats: Container[str]) -> None:
    """An input that was named to stay float can do so only where all that reads it is float."""
    users = graph.users()
    for node in graph.nodes:
        found = rules.of_call(node) if node.op == INPUT else None
        reader = next((user.name for user in users[node.name] if user.name not in floats), None)
        if found is not None and found.place and found.qconfig is None and reader is not None:
            raise QConfigError(
                "QAT146",
                node.name,
                f"is to stay float, but {reader} reads it in integers",
                "Keep its readers in float too, or leave the input quantized",
            )


# -- from a torch model ------------------------------------------------------------------------------------------------


def fuse_fx(
    model: nn.Module,
    example_inputs: Inputs,
    leaf: Sequence[str] = (),
    wrap: Sequence[Callable[..., Any]] = (),
    rules: Rules | None = None,
) -> Graph:
    """Traced and fused graph of ``model``, checked to compute what the model computes.

    ``rules`` tell what is not fused because only a part of it is float; by default those of the modules' attributes.
    Raises GraphError (QAT137) if it does not compute the same, as when an in-place operation changes a tensor that is
    read again.
    """
    rules = rules or Rules(QConfig(), attributes=attributes_of(model))
    inputs = ordered_inputs(model, example_inputs)
    graph = rules.fuse(trace(model, inputs, leaf, wrap))
    check_same(model, graph, inputs)
    return graph


def prepare_qat_fx(
    model: nn.Module,
    qconfig_dict: Mapping[str, Any] | QConfig | None = None,
    hybrid: bool = False,
    hybrid_dict: Mapping[str, Sequence[Any]] | None = None,
    *,
    example_inputs: Inputs,
    leaf: Sequence[str] = (),
    wrap: Sequence[Callable[..., Any]] = (),
) -> FakeQuantModel:
    """Fake-quant form of ``model``, to calibrate and train. The model itself is not changed.

    Args:
        qconfig_dict: keys ``""`` (global), ``"module_type"`` and ``"module_name"`` (mappings to a QConfig or None);
            priority global < type < name < the module's own ``qconfig`` attribute. None means not quantized. What is
            said of a module holds for all inside of it, unless something further inside is named. Of fused operators
            the weights go by the first, the output by the last that is named; one that is to be float is not fused. An
            input of the model goes by its argument's name. A convolution or linear at the output whose QConfig is the
            global one keeps its int32 accumulator.
        hybrid: allow operators that stay float. ``hybrid_dict`` names them by ``"module_type"`` and ``"module_name"``.
        example_inputs: real tensors, batch first, in the order of ``forward`` or by its names.

    Raises GraphError as :func:`qatlib.graph.trace.trace`; QConfigError (QAT146) for a name or type that matches
    nothing, or float operators without ``hybrid``; QAT142 for what is no QConfig.
    """
    rules = rules_of(model, qconfig_dict, hybrid_dict)
    graph = fuse_fx(model, example_inputs, leaf, wrap, rules)
    rules.check_hit(graph)
    return prepare_by(rules, graph, hybrid)


def prepare_by(rules: Rules, graph: Graph, hybrid: bool) -> FakeQuantModel:
    """FakeQuantModel of a graph that ``rules`` fused.

    What quantizes the output of a float operator has the global QConfig, or the default one if that is None. Raises
    QConfigError (QAT146) for float operators without ``hybrid``.
    """
    found_by = {node.name: rules.of(node) for node in graph.nodes}
    chosen = {name: found.qconfig for name, found in found_by.items()}
    floats = {node.name for node in graph.nodes if chosen[node.name] is None and node.op != INPUT}
    if floats and not hybrid:
        raise QConfigError(
            "QAT146",
            sorted(floats)[0],
            f"{len(floats)} operators are to stay float",
            "Pass hybrid=True, or give them a qconfig",
        )
    _check_float_inputs(rules, graph, floats)
    standard = rules.default or QConfig()

    def choose(node: Node) -> QConfig:
        found = chosen.get(node.name) or (chosen.get(node.inputs[0]) if node.op == "quantize" else None) or standard
        if node.format is not None and node.name not in rules.names:
            return found.with_format(node.format)
        if found is standard and node.name in chosen and is_high_precision_candidate(graph, node):
            return replace(found, activation=None)
        return found

    def origin(node: Node) -> tuple[str, str]:
        if node.format is not None and node.name not in rules.names:
            return BY_OPERATOR, ""
        name = node.inputs[0] if node.op == "quantize" and node.name not in found_by else node.name
        return found_by[name].rule, rules.of_call(node).rule

    return prepare_graph(graph, choose, floats, origin)
