"""What analysis switches as one: an op by the name it has in ``params.yaml``, or all ops of a module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from qatlib.analysis.records import match_name
from qatlib.errors import QConfigError
from qatlib.fake.model import FakeQuantModel
from qatlib.graph.calls import calls_of_shared
from qatlib.graph.ir import Node


@dataclass(frozen=True)
class Unit:
    """``name`` means ``ops`` in ``params.yaml``; of what quantizes an input of the network it is the input's name.

    ``type`` is the module or function, empty for a module that was named as a whole.
    """

    name: str
    ops: tuple[str, ...]
    type: str = ""
    is_input: bool = False


def unit_name(node: Node, call: int = 0) -> str:
    """``call`` is which one it is of a module that is called several times, from 1."""
    return node.inputs[0] if node.op == "quantize" and not node.module else match_name(node.name, node.module, call)


def units_of(model: FakeQuantModel, ops: Collection[str], groups: Sequence[str] = ()) -> tuple[Unit, ...]:
    """The ``ops`` one by one, in forward order, or by the modules named in ``groups``.

    Raises QConfigError (QAT144) for a group that holds none of the ops, QAT216 for an op in two groups.
    """
    calls = calls_of_shared(model.graph.nodes)
    nodes = {name: op.node for name, op in model.ops() if name in ops}
    names = {name: unit_name(node, calls.get(name, (0, 0))[0]) for name, node in nodes.items()}
    if groups:
        return _groups(nodes, names, groups)
    found: dict[str, list[Node]] = {}
    for name, node in nodes.items():
        found.setdefault(names[name], []).append(node)
    return tuple(
        Unit(name, tuple(n.name for n in same), same[0].module_type.rpartition(".")[2], name in model.graph.inputs)
        for name, same in found.items()
    )


def _groups(nodes: Mapping[str, Node], names: Mapping[str, str], groups: Sequence[str]) -> tuple[Unit, ...]:
    owner: dict[str, str] = {}
    for group in groups:
        inside = [name for name, node in nodes.items() if node.is_under(group) or names[name] == group]
        if not inside:
            fix = "Use a name from print(model) that holds a quantized op"
            raise QConfigError("QAT144", f"group {group!r}", "no quantized op is under this name", fix)
        for name in inside:
            if name in owner:
                seen = f"is in group {owner[name]!r} and in {group!r}"
                raise QConfigError("QAT216", name, seen, "Name groups that hold no op in common")
            owner[name] = group
    order = list(nodes)
    units = (Unit(group, tuple(name for name in order if owner.get(name) == group)) for group in groups)
    return tuple(sorted(units, key=lambda unit: order.index(unit.ops[0])))
