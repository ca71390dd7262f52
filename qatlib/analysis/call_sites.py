"""Modules that a model calls several times: range and scale of every call, and how far the calls are apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from qatlib.analysis.records import Capture, OpRecord
from qatlib.analysis.statistics import network_inputs
from qatlib.analysis.stats import Summary
from qatlib.atomic import write_csv
from qatlib.graph.calls import calls_of_shared
from qatlib.graph.ir import Graph, Node

APART = 4.0
"""Ratio of output ranges from which one scale for all calls costs the narrowest 2 bits, 12 dB of its SQNR."""


@dataclass(frozen=True)
class CallSite:
    """One call of a module that is called ``calls`` times, in the first model's real numbers; None if not measured.

    ``op`` is what computes it: itself, the last step of a composite, or the operator that it was fused into, whose
    output is told; the input is known where the call comes first in it. ``scale`` is that of the output in the second
    model. ``ratio`` is the largest magnitude of the output over that of the widest call, 0 to
    1. ``parameters`` are the numbers in the tensors that the calls share, 0 without a graph.
    """

    module: str
    type: str
    calls: int
    call: int
    op: str
    input_min: float | None
    input_max: float | None
    output_min: float | None
    output_max: float | None
    scale: float | None
    ratio: float | None
    parameters: int

    @property
    def amax(self) -> float | None:
        """Largest magnitude of the output."""
        if self.output_min is None or self.output_max is None:
            return None
        return max(abs(self.output_min), abs(self.output_max))


def shared_calls(seen: Capture, graph: Graph | None = None) -> tuple[CallSite, ...]:
    """A row per call of every module that is called more than once, in forward order.

    With ``graph``, that of the models, modules that were fused into others are among them.
    """
    parts = _parts(seen.records, graph)
    calls = calls_of_shared(parts)
    sites: dict[tuple[str, int], list[_Part]] = {}
    for part in parts:
        if part.name in calls:
            sites.setdefault((part.module, calls[part.name][0]), []).append(part)
    records, given = {record.name: record for record in seen.records}, network_inputs(seen)
    widest: dict[str, float] = {}
    for (module, _), made in sites.items():
        if output := made[-1].output:
            widest[module] = max(widest.get(module, 0.0), output.amax)
    rows = []
    for (module, call), made in sites.items():
        first, last = made[0], made[-1]
        source = records.get(first.input)
        entered = source.reference if source else given.get(first.input)
        output = last.output
        rows.append(
            CallSite(
                module=module,
                type=first.type,
                calls=calls[first.name][1],
                call=call,
                op=last.record.name,
                input_min=entered.min if entered else None,
                input_max=entered.max if entered else None,
                output_min=output.min if output else None,
                output_max=output.max if output else None,
                scale=last.record.scale if output else None,
                ratio=output.amax / widest[module] if output and widest[module] else None,
                parameters=max(part.parameters for part in made),
            )
        )
    return tuple(rows)


@dataclass(frozen=True)
class _Part:
    """A call as it was traced, and the record of the operator that it is in; empty where its input is not a value."""

    name: str
    module: str
    type: str
    record: OpRecord
    input: str
    parameters: int = 0

    @property
    def output(self) -> Summary | None:
        return self.record.reference


def _parts(records: Sequence[OpRecord], graph: Graph | None) -> list[_Part]:
    nodes = {} if graph is None else graph.by_name()
    found = []
    for record in records:
        node, source = nodes.get(record.name), record.inputs[0] if record.inputs else ""
        size = _size(node) if node else 0
        found.append(_Part(record.name, record.module, _short(record.module_type), record, source, size))
        found += (
            _Part(part.name, part.module, _short(part.module_type), record, "", _size(part))
            for part in (node.fused if node else ())
        )
    return found


def _short(module_type: str) -> str:
    return module_type.rpartition(".")[2]


def _size(node: Node) -> int:
    return sum(tensor.numel() for tensor in node.params.values())


def write_shared(rows: Iterable[CallSite], path: Path) -> None:
    """One line per call, 6 significant digits; an empty field where nothing was measured."""
    write_csv(path, (field.name for field in fields(CallSite)), map(astuple, rows))
