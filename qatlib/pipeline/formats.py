"""The formats that ``params.yaml`` asks for, as a QConfig for every operator."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from qatlib.errors import QConfigError
from qatlib.fake.choose import Rules
from qatlib.fake.prepare import BY_OPERATOR, is_high_precision_candidate
from qatlib.fake.qconfig import FakeQuantSpec, Kind, QConfig, method_for
from qatlib.graph.calls import further_names
from qatlib.graph.ir import INPUT, Graph, Node
from qatlib.ops.base import BY_NAME, Format
from qatlib.pipeline.config import Config, InputFormat, Override
from qatlib.pipeline.match import first_match, first_owner


def owners_of(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Names a user may write → operators: of operators, of what was fused into them, of modules made of functions.

    The name of a module stands for all of its calls, ``#0`` behind it for the first, ``#1`` for the second.
    """
    parts = [_Part(node.name, node.module, node.name) for node in graph.nodes if node.op != INPUT]
    last = {node.composite: _Part(node.composite, node.module, node.name) for node in graph.nodes if node.composite}
    parts += last.values()
    parts += [_Part(part.name, part.module, node.name) for node in graph.nodes for part in node.fused]
    owners: dict[str, dict[str, None]] = {}
    for part in parts:
        owners.setdefault(part.name, {part.operator: None})
    for name, part in further_names(parts):
        owners.setdefault(name, {})[part.operator] = None
    found = {name: tuple(operators) for name, operators in owners.items()}
    for module, operators in _made_of_functions(graph).items():
        found.setdefault(module, operators)
    return found


def within(owners: Mapping[str, tuple[str, ...]], operators: Container[str]) -> dict[str, tuple[str, ...]]:
    """The names that stand for any of ``operators``, and for which."""
    found = {name: tuple(each for each in owned if each in operators) for name, owned in owners.items()}
    return {name: owned for name, owned in found.items() if owned}


@dataclass(frozen=True)
class _Part:
    """A call as it was traced, of ``module``, and the operator that it is in."""

    name: str
    module: str
    operator: str


def _made_of_functions(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Operators of every module that calls functions and no module, such as a convolution that makes its weights."""
    last = {node.composite or node.name: node.name for node in graph.nodes}
    calls = [(last[node.composite or node.name], part) for node in graph.nodes for part in (node, *node.fused)]
    callers = {path for _, part in calls for path, _ in part.scope[:-1]}
    found: dict[str, dict[str, None]] = {}
    for operator, part in calls:
        if part.scope and not part.module and part.scope[-1][0] not in callers:
            found.setdefault(part.scope[-1][0], {})[operator] = None
    return {path: tuple(operators) for path, operators in found.items()}


class Formats:
    """``qconfig`` of ``params.yaml``, and of modules that have it as an attribute, as a choice per node.

    ``floats`` are the operators that such an attribute keeps in float.
    """

    def __init__(self, config: Config, graph: Graph, attributes: Mapping[str, QConfig | None]) -> None:
        section, calibrate = config.qconfig, config.calibrate
        self._graph, self._section, self._outputs = graph, section, section.outputs
        default = FakeQuantSpec(
            dtype=section.default.activation,
            method=method_for(section.default.activation, calibrate.method),
            percentile=calibrate.percentile,
            bins=calibrate.bins,
            averaging_constant=config.qat.averaging_constant,
            kind=config.qat.fake_quant,
        )
        kind: Kind = "moving_average" if config.qat.fake_quant == "pact" else config.qat.fake_quant
        dtype, method = section.default.weight, calibrate.weight_method
        weight = replace(QConfig().weight, dtype=dtype, method=method, kind=kind)
        whole = attributes.get("", QConfig(default, weight))
        self._whole = "model.qconfig" if "" in attributes else "qconfig.default"
        self._default = (whole and whole.activation) or default
        self._method = calibrate.method if self._default is default else self._default.method
        self._weight = whole.weight if whole else weight
        rules = Rules(whole, attributes=attributes)
        found = {node.name: rules.of(node) for node in graph.nodes if node.op != INPUT}
        self._given = {name: one for name, one in found.items() if one.place}
        self.floats = tuple(name for name, one in found.items() if one.qconfig is None)
        self._overrides = first_owner(section.overrides, owners_of(graph), "qconfig.overrides")
        self._refuse_without_effect(section.overrides)
        self._inputs = first_match(section.inputs, graph.inputs, "qconfig.inputs")
        self._candidates = {n.name for n in graph.nodes if is_high_precision_candidate(graph, n)}

    def _refuse_without_effect(self, records: tuple[Override, ...]) -> None:
        """An override that only names ops which pass on the format of their input would change nothing.

        Nor would one that names modules which have their own QConfig.
        """
        nodes = self._graph.by_name()
        for index, record in enumerate(records):
            hit = [nodes[name] for name, used in self._overrides.items() if used is record]
            if hit and all(node.name in self._given for node in hit):
                raise QConfigError(
                    "QAT147",
                    f"qconfig.overrides[{index}].match {record.match!r}",
                    f"names only {', '.join(node.name for node in hit[:5])}, whose modules have an attribute qconfig",
                    "Remove the override, or the attribute where the model is made",
                )
            if hit and all(node.op in BY_NAME and BY_NAME[node.op].keeps_scale for node in hit):
                raise QConfigError(
                    "QAT147",
                    f"qconfig.overrides[{index}].match {record.match!r}",
                    f"names only {', '.join(node.name for node in hit[:5])}, which keep the format of their input",
                    f"Name the operator that makes the value, {hit[0].inputs[0]}",
                )

    def __call__(self, node: Node) -> QConfig:
        return self._chosen(node)[0]

    def origin(self, node: Node) -> tuple[str, str]:
        """What the output and the weights of a node go by: a key of ``params.yaml``, or an attribute of a module."""
        if node.name in self.floats:
            return self._given[node.name].rule if node.name in self._given else self._whole, ""
        return self._chosen(node)[1]

    def _chosen(self, node: Node) -> tuple[QConfig, tuple[str, str]]:
        given = self._given.get(node.name)
        if given is not None and given.qconfig is not None:
            return given.qconfig.with_format(node.format), (given.rule, given.rule)
        record: Override | InputFormat | None = self._overrides.get(node.name)
        if record is None and node.op == "quantize":
            record = self._inputs.get(node.inputs[0])
        override, place = record if isinstance(record, Override) else None, self._place(record)
        weight, weight_rule = self._weight, self._whole
        if override is not None and override.weight is not None:
            weight, weight_rule = replace(weight, dtype=override.weight), place
        if self._high_precision(node, override):
            rule = place if override is not None and override.high_precision else "qconfig.outputs"
            return QConfig(None, weight), (rule, weight_rule)
        standard = self._whole if node.format is None else BY_OPERATOR
        if record is None:
            return QConfig(self._default, weight).with_format(node.format), (standard, weight_rule)
        asked = node.format or Format()
        dtype = record.activation or asked.dtype or self._default.dtype
        scale = record.scale if record.scale or record.activation else asked.scale
        method = method_for(dtype, self._method)
        only_weight = (
            override is not None and not (override.activation or override.scale) and override.high_precision is None
        )
        rules = standard if only_weight else place, weight_rule
        return QConfig(replace(self._default, dtype=dtype, scale=scale, method=method), weight), rules

    def _place(self, record: Override | InputFormat | None) -> str:
        """Where a record stands in ``params.yaml``."""
        if isinstance(record, Override):
            return f"qconfig.overrides[{self._section.overrides.index(record)}]"
        return "" if record is None else f"qconfig.inputs[{self._section.inputs.index(record)}]"

    def _high_precision(self, node: Node, record: Override | None) -> bool:
        if record is not None and record.high_precision is not None:
            return record.high_precision
        asked = record is not None and (record.activation is not None or record.scale is not None)
        return self._outputs.high_precision and node.name in self._candidates and not asked
