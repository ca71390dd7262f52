"""Step quantization: the error at the output when the first k ops, or groups, are rounded and the rest is float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qatlib.analysis.batches import peek, samples_at_once
from qatlib.analysis.distance import Distance, Meter, NewMetric
from qatlib.analysis.replay import Form, FormedModel, Replay
from qatlib.analysis.states import require_quantized
from qatlib.analysis.units import Unit, units_of
from qatlib.fake.model import FakeQuantModel


@dataclass(frozen=True)
class Step:
    """``first`` is with this unit and all before it rounded, ``alone`` with this unit only; the rest is float."""

    unit: Unit
    first: Distance
    alone: Distance


@dataclass(frozen=True)
class Steps:
    """The curve, in forward order. ``start`` is with nothing rounded."""

    start: Distance
    steps: tuple[Step, ...]
    samples: int

    def steepest(self) -> Step | None:
        """The step that adds most to the error power at the output."""
        noises = [self.start.noise, *(step.first.noise for step in self.steps)]
        rises = [(after - before, -i) for i, (before, after) in enumerate(pairwise(noises))]
        return self.steps[-max(rises)[1]] if rises else None


def step_quantization(
    model: FakeQuantModel, batches: Any, *, groups: Sequence[str] = (), metric: NewMetric | None = None
) -> Steps:
    """Round one more op at a time, in forward order, and each alone; with ``groups`` one named module at a time.

    The reference is the model without rounding. What is in no group stays float. To train with ops left in float, name
    them in ``qat.hybrid``. Arguments and errors are those of :func:`qatlib.sensitivity`.
    """
    require_quantized(model, "model")
    formed, device = FormedModel(model), model.state_code.device
    data, _ = peek(batches, model.graph.inputs)
    units = units_of(model, formed.full, groups)
    start, first, alone = Meter(metric), [Meter(metric) for _ in units], [Meter(metric) for _ in units]
    samples = 0
    most = samples_at_once(model.graph.nodes, model.graph.outputs)
    for batch in (part for b in data for part in b.to(device).parts(most)):
        replay = Replay(formed.model, batch.inputs, formed.computing({}))
        reference = replay.outputs
        start.add(reference, reference, replay.nested(reference), batch.targets)
        for unit, meter in zip(units, alone, strict=True):
            compute = formed.computing({name: formed.full[name] for name in unit.ops})
            leaves = replay.variant(unit.ops, compute)
            meter.add(reference, leaves, replay.nested(leaves), batch.targets)
        rounded: dict[str, Form] = {}
        for unit, meter in zip(units, first, strict=True):
            rounded |= {name: formed.full[name] for name in unit.ops}
            leaves = replay.variant(unit.ops, formed.computing(rounded), keep=True)
            meter.add(reference, leaves, replay.nested(leaves), batch.targets)
        samples += len(batch)
    steps = tuple(Step(unit, a.result(), b.result()) for unit, a, b in zip(units, first, alone, strict=True))
    return Steps(start.result(), steps, samples)
