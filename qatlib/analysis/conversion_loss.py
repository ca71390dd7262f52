"""Which ops make the integer model differ from fake-quant: each alone in integers, and the fewest that explain it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qatlib.analysis.batches import Batch, peek, samples_at_once
from qatlib.analysis.distance import Distance, Meter, NewMetric
from qatlib.analysis.pieces import real
from qatlib.analysis.records import Unmeasured
from qatlib.analysis.replay import Compute, Replay
from qatlib.analysis.sides import IntegerSide, UnmeasurableError
from qatlib.analysis.states import emulator_of, require_quantized
from qatlib.analysis.units import Unit, units_of
from qatlib.errors import ConfigError
from qatlib.fake.model import FakeQuantModel

EXPLAINED = 0.9
"""Share of the error power of the whole that a set of ops has to make to explain it."""


@dataclass(frozen=True)
class IntegerTrial:
    """``alone`` is with this unit in integers and all others in fake-quant form; ``share`` is its part of the whole."""

    unit: Unit
    alone: Distance
    share: float


@dataclass(frozen=True)
class ConversionLoss:
    """``whole`` is the distance of the integer model from fake-quant, ``fake_metric`` the metric of the latter.

    ``smallest`` are units that in integers, with all others in fake-quant form, make the share ``explained`` of the
    error power; without any one of them it is less than was asked for. ``preserved`` is the distance with them in
    fake-quant form and all others in integers, as ``convert.preserve`` leaves it.
    """

    whole: Distance
    fake_metric: float | None
    trials: tuple[IntegerTrial, ...]
    smallest: tuple[Unit, ...]
    explained: float
    preserved: Distance
    samples: int
    unmeasured: tuple[Unmeasured, ...] = ()

    def ranked(self) -> tuple[IntegerTrial, ...]:
        """Trials, the largest share first."""
        return tuple(sorted(self.trials, key=lambda trial: -trial.share))


def bisect_conversion(
    model: FakeQuantModel,
    integer: Any,
    batches: Any,
    *,
    groups: Sequence[str] = (),
    metric: NewMetric | None = None,
    explained: float = EXPLAINED,
) -> ConversionLoss:
    """Find the ops that lose between a FakeQuantModel in VALIDATION state and its integer form.

    ``integer`` is a Program, an Emulator or what convert_fx returned. Ops are put into integers one at a time, only
    what follows being run again; then the fewest of the costliest that explain the loss are bisected, and those of them
    that it does without are dropped. The inputs of all batches are held in memory. Raises StateError QAT155 or QAT156,
    ConfigError QAT217 for ``explained`` outside of 0 to 1, and as :func:`qatlib.sensitivity`.
    """
    if not 0.0 < explained <= 1.0:
        raise ConfigError("QAT217", "explained", f"is {explained}", "Use a share of the loss above 0, at most 1")
    fake = require_quantized(model, "model")
    data, _ = peek(batches, fake.graph.inputs)
    trials = _Trials(fake, IntegerSide(emulator_of(integer, fake.state_code.device)), list(data), metric)
    units = units_of(fake, trials.names, groups)
    whole = trials.distance(trials.names)
    alone = trials.one_by_one(units)
    parts = tuple(
        IntegerTrial(unit, seen, seen.noise / whole.noise if whole.noise else 0.0)
        for unit, seen in zip(units, alone, strict=True)
    )
    order = [trial.unit for trial in sorted(parts, key=lambda trial: -trial.share)]

    def enough(chosen: Sequence[Unit]) -> bool:
        return trials.distance(_ops(chosen)).noise >= explained * whole.noise

    smallest = _smallest(order, enough) if whole.noise else []
    return ConversionLoss(
        whole=whole,
        fake_metric=trials.distance(()).metric,
        trials=parts,
        smallest=tuple(smallest),
        explained=trials.distance(_ops(smallest)).noise / whole.noise if whole.noise else 1.0,
        preserved=trials.distance(trials.names - _ops(smallest)),
        samples=sum(map(len, trials.batches)),
        unmeasured=tuple(trials.unmeasured.values()),
    )


def _ops(units: Collection[Unit]) -> set[str]:
    return {name for unit in units for name in unit.ops}


def _smallest(order: Sequence[Unit], enough: Callable[[Sequence[Unit]], bool]) -> list[Unit]:
    """A shortest part of ``order`` from its start that is ``enough``, less what it does without, the last first."""
    low, high = 0, len(order)  # more than low, at most high, are needed: all are enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(order[:middle]) else (middle, high)
    chosen = list(order[:high])
    for unit in reversed(chosen.copy()):
        rest = [other for other in chosen if other is not unit]
        if rest and enough(rest):
            chosen = rest
    return chosen


class _Trials:
    """Runs of the network with some ops in integers and all others in fake-quant form."""

    def __init__(self, fake: FakeQuantModel, side: IntegerSide, batches: list[Batch], metric: NewMetric | None) -> None:
        most = samples_at_once(fake.graph.nodes, fake.graph.outputs)
        self.batches = [part for batch in batches for part in batch.to(fake.state_code.device).parts(most)]
        self._fake, self._side, self._metric = fake, side, metric
        self.unmeasured: dict[str, Unmeasured] = {}
        self.names: set[str] = set()
        for name, op in fake.ops():
            if why := side.absent(name):
                self.unmeasured[name] = Unmeasured(name, "integer form", why)
            elif not (op.hybrid or op.preserve_qat_mode):
                self.names.add(name)

    def distance(self, integers: Collection[str]) -> Distance:
        """Of the network with the ops ``integers`` in integers from fake-quant."""
        meter = Meter(self._metric)
        for batch in self.batches:
            reference = Replay(self._fake, batch.inputs, self._computing(())).outputs
            replay = Replay(self._fake, batch.inputs, self._computing(integers))
            meter.add(reference, replay.outputs, replay.nested(replay.outputs), batch.targets)
        return meter.result()

    def one_by_one(self, units: Sequence[Unit]) -> list[Distance]:
        """The same for each unit alone."""
        meters = [Meter(self._metric) for _ in units]
        for batch in self.batches:
            replay = Replay(self._fake, batch.inputs, self._computing(()))
            for unit, meter in zip(units, meters, strict=True):
                leaves = replay.variant(unit.ops, self._computing(unit.ops))
                meter.add(replay.outputs, leaves, replay.nested(leaves), batch.targets)
        return [meter.result() for meter in meters]

    def _computing(self, integers: Collection[str]) -> Compute:
        def compute(name: str, inputs: tuple[Tensor, ...]) -> Tensor:
            if name in integers:
                try:
                    return real(self._side.same_input(name, self._fake.op(name).node.inputs, inputs))
                except UnmeasurableError as error:
                    self.unmeasured[name] = Unmeasured(name, "integer form", str(error))
            return self._fake.compute(name, *inputs)

        return compute
