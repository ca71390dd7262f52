"""Which QConfig every operator has: rules by type and name, and the attribute ``qconfig`` of modules.

The more exact wins: global < module type < name of a module or call. An attribute is a rule for its module's name, and
wins over one that ``qconfig_dict`` has for the same name; a rule for a module holds for the calls inside of it, unless
one for a module or call further inside says otherwise. The attribute of the model itself is the global QConfig.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qatlib.errors import QConfigError
from qatlib.fake.qconfig import QConfig
from qatlib.graph.fuse import fuse
from qatlib.graph.ir import INPUT, OPAQUE, Graph, Node
from qatlib.graph.source import class_name, function_type


@dataclass(frozen=True)
class Found:
    """The QConfig of a call, None for float, and the module or call that it was given to; "" is the whole model.

    ``hybrid``: float because ``hybrid_dict`` says so. ``rule`` is the setting, in words.
    """

    qconfig: QConfig | None
    place: str = ""
    hybrid: bool = False
    rule: str = "global"

    def surrounds(self, other: Found) -> bool:
        """Whether it was given to something that holds what the other was given to."""
        return other.place.startswith(f"{self.place}.") if self.place else bool(other.place)


@dataclass(frozen=True)
class Rules:
    """All that says which QConfig a call has; None is float.

    ``attributes`` are by qualified name, without the model's own. ``float_types`` and ``float_names`` are those of
    ``hybrid_dict``, which win.
    """

    default: QConfig | None = None
    types: Mapping[str, QConfig | None] = field(default_factory=dict)
    names: Mapping[str, QConfig | None] = field(default_factory=dict)
    attributes: Mapping[str, QConfig | None] = field(default_factory=dict)
    float_types: frozenset[str] = frozenset()
    float_names: frozenset[str] = frozenset()

    def of_call(self, node: Node) -> Found:
        """Of one call as it was traced, whatever is fused into it."""
        found = Found(self.default)
        if node.op == OPAQUE:
            return found
        for place, kind in node.types():
            if kind in self.types:
                found = Found(self.types[kind], place, rule=f"module_type {kind}")
        for place in node.places():
            if place in self.names:
                found = Found(self.names[place], place, rule=f"module_name {place}")
            is_module = place != node.name or place == node.module
            if place in self.attributes and is_module and node.op != INPUT:
                found = Found(self.attributes[place], place, rule=f"{place}.qconfig")
        hybrid = [place for place, kind in node.types() if kind in self.float_types]
        hybrid += [place for place in node.places() if place in self.float_names]
        return Found(None, hybrid[-1], hybrid=True, rule="hybrid_dict") if hybrid else found

    def of(self, node: Node) -> Found:
        """Of a fused operator: weights as its first part, output as the last part that has a rule of its own."""
        *_, found = self._winners(node)
        weights = self.of_call(node).qconfig
        if found.qconfig is None or weights is None or found.qconfig.weight == weights.weight:
            return found
        return replace(found, qconfig=replace(found.qconfig, weight=weights.weight))

    def fuse(self, traced: Graph) -> Graph:
        """The graph fused, except where one part is to be float and another is not."""
        while True:
            graph = fuse(traced)
            apart = {name for node in graph.nodes if (name := self._parts_at(node))}
            if not apart:
                return graph
            nodes = (replace(node, alone=node.alone or node.name in apart) for node in traced.nodes)
            traced = replace(traced, nodes=tuple(nodes))

    def _winners(self, node: Node) -> Iterator[Found]:
        """What decides for the operator after each of its parts."""
        found = self.of_call(node)
        yield found
        for part in node.fused:
            other = self.of_call(part)
            found = found if other.surrounds(found) else other
            yield found

    def _parts_at(self, node: Node) -> str:
        """Name of the first part that is float where those before it are not, or the other way round; else empty."""
        first, *later = self._winners(node)
        for part, found in zip(node.fused, later, strict=True):
            if (found.qconfig is None) != (first.qconfig is None):
                return part.name
        return ""

    def check_hit(self, graph: Graph) -> None:
        """Raise QConfigError QAT146 for a name or type that matches no operator."""
        for name in (*self.names, *self.float_names):
            if not any(node.is_under(name) for node in graph.nodes):
                raise _hits_nothing(f"module_name {name!r}", [node.name for node in graph.nodes])
        for kind in (*self.types, *self.float_types):
            if not any(node.is_of(kind) for node in graph.nodes):
                raise _hits_nothing(f"module_type {kind}", sorted({node.module_type for node in graph.nodes}))


def rules_of(
    model: nn.Module,
    qconfig_dict: Mapping[str, Any] | QConfig | None,
    hybrid_dict: Mapping[str, Sequence[Any]] | None = None,
) -> Rules:
    """The rules that the user gave as arguments of ``prepare_qat_fx``, and as attributes of modules.

    Raises QConfigError: QAT146 for an unknown key, QAT142 for a value that is no QConfig.
    """
    given: Mapping[str, Any] = qconfig_dict if isinstance(qconfig_dict, Mapping) else {"": qconfig_dict or QConfig()}
    floats = hybrid_dict or {}
    for argument, keys in (("qconfig_dict", set(given) - {""}), ("hybrid_dict", set(floats))):
        if unknown := sorted(keys - {"module_type", "module_name"}):
            known = "Use '', 'module_type', 'module_name'"
            raise QConfigError("QAT146", f"{argument}[{unknown[0]!r}]", "is unknown", known)
    types = {_type_name(kind): qconfig for kind, qconfig in dict(given.get("module_type", {})).items()}
    names = dict(given.get("module_name", {}))
    for key, qconfig in {"": given.get(""), **types, **names}.items():
        _check_is_qconfig(f"qconfig_dict of {key!r}", qconfig)
    attributes = attributes_of(model)
    return Rules(
        attributes.pop("", given.get("", QConfig())),
        types,
        names,
        attributes,
        frozenset(_type_name(kind) for kind in floats.get("module_type", ())),
        frozenset(floats.get("module_name", ())),
    )


def attributes_of(model: nn.Module) -> dict[str, QConfig | None]:
    """The attribute ``qconfig`` by qualified module name; "" is the model. Raises QConfigError QAT142."""
    given = {name: module.qconfig for name, module in model.named_modules() if hasattr(module, "qconfig")}
    for name, qconfig in given.items():
        _check_is_qconfig(f"{name}.qconfig".removeprefix("."), qconfig)
    return given


def _check_is_qconfig(where: str, qconfig: Any) -> None:
    if qconfig is not None and not isinstance(qconfig, QConfig):
        raise QConfigError(
            "QAT142",
            where,
            f"is a {class_name(type(qconfig))}",
            "Use a qatlib.QConfig, such as qatlib.get_default_qconfig(), or None for float",
        )


def _type_name(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    return class_name(kind) if isinstance(kind, type) else function_type(kind)


def _hits_nothing(where: str, known: list[str]) -> QConfigError:
    return QConfigError("QAT146", where, "matches no operator", f"Known: {', '.join(known[:20])}")
