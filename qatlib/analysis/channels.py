"""Errors and statistics of ops channel by channel, on request: one channel may hide among hundreds of good ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatlib.analysis.capture import Inputs
from qatlib.analysis.pieces import real
from qatlib.analysis.records import Mode, call_title
from qatlib.analysis.sides import Output
from qatlib.analysis.states import neighbours
from qatlib.analysis.units import unit_name
from qatlib.atomic import csv_text, write_text
from qatlib.errors import ConfigError, QConfigError
from qatlib.graph.calls import calls_of_shared
from qatlib.graph.ir import INPUT, Node
from qatlib.ops.base import BY_NAME
from qatlib.ops.dense import Dense

COLUMNS = (
    "Module Name",
    "Channel",
    "Min",
    "Max",
    "Mean",
    "Var",
    "Scale",
    "Cosine",
    "MSE",
    "SQNR",
    "Acc Error (float atol)",
    "Acc Error (N out_qscale)",
)


@dataclass(frozen=True)
class ChannelRow:
    """One channel of an op's output, each model on its own inputs, over all batches.

    ``min``, ``max``, ``mean`` and ``var`` are of the first model, in the output's unit; ``scale`` is that of the
    second, None for float. ``max_abs`` is the largest absolute difference, ``max_lsb`` the same in scales. Two channels
    of zeros alone have cosine 0 and SQNR inf.
    """

    module: str
    channel: int
    min: float
    max: float
    mean: float
    var: float
    scale: float | None
    cosine: float
    mse: float
    sqnr_db: float
    max_abs: float
    max_lsb: float | None


@dataclass(frozen=True)
class ChannelTable:
    rows: tuple[ChannelRow, ...]

    def by_error(self) -> ChannelTable:
        """The same rows, the lowest SQNR first."""
        return ChannelTable(tuple(sorted(self.rows, key=lambda row: row.sqnr_db)))

    def csv(self) -> str:
        """Comma-separated text with a header line."""
        return csv_text(COLUMNS, map(astuple, self.rows))


def channel_similarity(
    model1: Any,
    model2: Any,
    inputs: Inputs | Iterable[Inputs],
    modules: Sequence[str],
    mode: Mode = "FvsQ",
    axis: int | None = None,
) -> ChannelTable:
    """The outputs of ``modules`` in two adjacent models, a row for each channel, in forward order.

    Args:
        modules: names as in ``params.yaml``; a module that holds others stands for all ops in it.
        axis: that of the channels; default: 1, and the last of what a linear makes and of matrices.

    Models, inputs and errors are those of :func:`qatlib.featuremap_similarity`. Raises QConfigError (QAT144) for a name
    that no op has, ConfigError (QAT217) for an axis that an output has not, or that holds its batch.
    """
    pair = neighbours(model1, model2, inputs, mode)
    reference, other = pair.reference, pair.other
    chosen = _chosen(pair.nodes, modules)
    gauges = {name: _Gauge(axis, node) for name, node in chosen.items() if not other.absent(name)}
    if not gauges:
        why = other.absent(next(iter(chosen)))
        raise QConfigError("QAT144", ", ".join(modules), why, "Name an op that both models have")
    with torch.no_grad(), pair.quantized.held_parameters():
        for batch in pair.batches:
            theirs = {name: real(x) for name, x in other.outputs(batch) if name in gauges}
            for name, _, output in reference.steps(batch):
                if name in gauges:
                    gauges[name].add(output, theirs.pop(name))
    calls = calls_of_shared(pair.nodes)
    rows = (
        row
        for name, gauge in gauges.items()
        for row in gauge.rows(
            call_title(name, chosen[name].module, calls.get(name, (0, 0))[0]), other.qtype(name).scale
        )
    )
    return ChannelTable(tuple(rows))


def write_channels(table: ChannelTable, mode: str, folder: Path) -> None:
    """``channels-<mode>.csv``, the worst first."""
    write_text(folder / f"channels-{mode}.csv", table.by_error().csv())


def _chosen(nodes: Sequence[Node], modules: Sequence[str]) -> dict[str, Node]:
    calls = calls_of_shared(nodes)
    ops = {node.name: node for node in nodes if node.op != INPUT}
    names = {name: unit_name(node, calls.get(name, (0, 0))[0]) for name, node in ops.items()}
    found: set[str] = set()
    for module in modules:
        inside = {name for name, node in ops.items() if node.is_under(module) or names[name] == module}
        if not inside:
            fix = "Use a name from print(model), or one of the similarity tables"
            raise QConfigError("QAT144", f"module {module!r}", "no op is under this name", fix)
        found |= inside
    return {name: node for name, node in ops.items() if name in found}


class _Gauge:
    """Sums over one op's output, a number for each channel."""

    def __init__(self, axis: int | None, node: Node) -> None:
        operator, axes = BY_NAME.get(node.op), len(node.shape)
        usual = operator.channel_axis if isinstance(operator, Dense) else 1 if axes > 2 else -1
        given = usual if axis is None else axis
        if not -axes <= given < axes or node.shape[given] < 0:
            shown = f"is {given}, where {node.described()} makes {list(node.shape)}, -1 being the batch"
            raise ConfigError("QAT217", "axis", shown, "Name the axis of the channels")
        self._axis = given % axes
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, reference: Tensor, output: Output) -> None:
        a, b = (x.movedim(self._axis, 0).flatten(1).double() for x in (reference, real(output)))
        if not a.shape[1]:
            return
        diff = b - a
        new = {
            "min": a.amin(1), "max": a.amax(1), "sum": a.sum(1), "sq": a.square().sum(1), "other": b.square().sum(1),
            "dot": (a * b).sum(1), "se": diff.square().sum(1), "largest": diff.abs().amax(1),
        }  # fmt: skip
        for key, seen in new.items():
            old = self._sums.get(key)
            if old is None:
                self._sums[key] = seen
            else:
                join = {"min": torch.minimum, "max": torch.maximum, "largest": torch.maximum}.get(key, torch.add)
                self._sums[key] = join(old, seen)
        self._count += a.shape[1]

    def rows(self, module: str, scale: float | None) -> Iterable[ChannelRow]:
        columns = {key: seen.tolist() for key, seen in self._sums.items()}
        for channel in range(len(columns.get("min", ()))):
            one = {key: column[channel] for key, column in columns.items()}
            mean = one["sum"] / self._count
            norm = math.sqrt(one["sq"] * one["other"])
            yield ChannelRow(
                module=module,
                channel=channel,
                min=one["min"],
                max=one["max"],
                mean=mean,
                var=max(0.0, one["sq"] / self._count - mean * mean),
                scale=scale,
                cosine=one["dot"] / norm if norm else 0.0,
                mse=one["se"] / self._count,
                sqnr_db=_sqnr_db(one["sq"], one["se"]),
                max_abs=one["largest"],
                max_lsb=one["largest"] / scale if scale else None,
            )


def _sqnr_db(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf
