"""Sensitivity: what rounding one op costs at the network's output, alone and among all others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qatlib.analysis.batches import peek, samples_at_once
from qatlib.analysis.distance import Distance, Meter, NewMetric
from qatlib.analysis.records import Unmeasured
from qatlib.analysis.replay import FLOAT, Form, FormedModel, Replay
from qatlib.analysis.states import require_quantized
from qatlib.analysis.stats import check_finite
from qatlib.analysis.taylor import rank_correlation, taylor_scores
from qatlib.analysis.units import Unit, units_of
from qatlib.errors import ConfigError
from qatlib.fake.model import FakeQuantModel

Kind = Literal["on", "off", "int16"]
Part = Literal["all", "weight", "activation"]


@dataclass(frozen=True)
class Trial:
    """One unit in another form than all others.

    ``kind`` on: it is rounded and all others are float; off: it is float and all others are rounded; int16: it has 16
    bits and all others are as they are. ``part`` says what of it; 16 bits are of weights or of activations. ``share``
    is its part of the whole error power: of "on" what the trial has of it, else what the trial takes away from it
    (negative where it adds some).
    """

    unit: Unit
    kind: Kind
    part: Part
    distance: Distance
    share: float


@dataclass(frozen=True)
class Sensitivity:
    """``whole`` is the distance with everything rounded, ``float_metric`` the metric with nothing rounded.

    ``scores`` rank units by gradient, before anything is measured; ``correlation`` is Spearman's, of the scores with
    the measured "on" distances, None for fewer than three. ``forwards`` is the number of ops computed over that of one
    run of the network.
    """

    whole: Distance
    float_metric: float | None
    trials: tuple[Trial, ...]
    samples: int
    scores: Mapping[str, float] = field(default_factory=dict)
    correlation: float | None = None
    unmeasured: tuple[Unmeasured, ...] = ()
    forwards: float = 0.0

    def find(self, name: str, kind: Kind = "off", part: Part = "all") -> Trial | None:
        """The trial of unit ``name``, None if it was not made."""
        return next((t for t in self.trials if (t.unit.name, t.kind, t.part) == (name, kind, part)), None)

    def ranked(self, kind: Kind = "off", part: Part = "all") -> tuple[Trial, ...]:
        """Trials of one kind, the largest share first."""
        return tuple(sorted((t for t in self.trials if (t.kind, t.part) == (kind, part)), key=lambda t: -t.share))

    def units(self) -> tuple[Unit, ...]:
        """What was measured, in forward order."""
        return tuple(dict.fromkeys(trial.unit for trial in self.trials))


def sensitivity(
    model: FakeQuantModel,
    batches: Any,
    *,
    kinds: Collection[Kind] = ("on", "off", "int16"),
    parts: bool = True,
    groups: Sequence[str] = (),
    top: int | None = None,
    metric: NewMetric | None = None,
) -> Sensitivity:
    """What every op costs, measured on ``batches`` (one batch of real inputs, or an iterable of batches).

    The reference is the model itself without rounding, so a trained model may be given. Every trial runs only the part
    of the network behind the op (:mod:`qatlib.analysis.replay`); memory holds the values of one batch.

    Args:
        kinds: trials to make, see :class:`Trial`. 16 bits of an activation have the range that calibration saw; those
            of weights leave out that sums may not fit into 32 bits.
        parts: also weights and activations apart, where an op has both.
        groups: names of modules to be measured as wholes; default: every op alone.
        top: measure only that many units, those whose gradient scores (of the first batch) are largest.
        metric: makes the user's metric, to have it of every trial; batches then need targets.

    Raises StateError QAT155 or QAT156 unless the model is a FakeQuantModel in VALIDATION state; ConfigError QAT217 for
    a kind that there is none; DataError QAT118, QAT214, QAT215; QConfigError QAT144 or QAT216 for groups; TrainingError
    QAT165 for outputs that are not finite.
    """
    if unknown := set(kinds) - set(get_args(Kind)):
        raise ConfigError("QAT217", "kinds", f"holds {sorted(unknown)[0]!r}", f"Use {', '.join(get_args(Kind))}")
    if top is not None and top < 1:
        raise ConfigError("QAT217", "top", f"is {top}", "Use a number of units, at least 1, or None for all")
    require_quantized(model, "model")
    formed, device = FormedModel(model), model.state_code.device
    data, first = peek(batches, model.graph.inputs)
    units = units_of(model, formed.full, groups)
    scores = taylor_scores(formed, units, first.to(device).inputs)
    chosen = units if top is None else sorted(units, key=lambda unit: -scores[unit.name])[:top]
    plans, unmeasured = _plans(formed, [unit for unit in units if unit in chosen], kinds, parts)
    meters = {plan: Meter(metric) for plan in plans}
    whole, exact = Meter(metric), Meter(metric)
    samples = computed = 0
    most = samples_at_once(model.graph.nodes, model.graph.outputs)
    for batch in (part for b in data for part in b.to(device).parts(most)):
        rounded = Replay(formed.model, batch.inputs, formed.computing(formed.full))
        base = Replay(formed.model, batch.inputs, formed.computing({}))
        reference = base.outputs
        for name, leaf in zip(model.graph.outputs, reference, strict=True):
            check_finite(leaf, name)
        exact.add(reference, reference, base.nested(reference), batch.targets)
        whole.add(reference, rounded.outputs, rounded.nested(rounded.outputs), batch.targets)
        for (unit, kind, part), meter in meters.items():
            replay = base if kind == "on" else rounded
            leaves = replay.variant(unit.ops, formed.computing(plans[unit, kind, part]))
            meter.add(reference, leaves, replay.nested(leaves), batch.targets)
        samples += len(batch)
        computed += len(batch) * (base.computed + rounded.computed)
    total = whole.result()
    trials = [_trial(*plan, meter.result(), total) for plan, meter in meters.items()]
    on = [(scores[t.unit.name], t.distance.noise) for t in trials if (t.kind, t.part) == ("on", "all")]
    return Sensitivity(
        whole=total,
        float_metric=exact.result().metric,
        trials=tuple(trials),
        samples=samples,
        scores=scores,
        correlation=rank_correlation(*zip(*on, strict=True)) if len(on) > 2 else None,
        unmeasured=tuple(unmeasured),
        forwards=computed / max(1, samples * (len(model.graph.nodes) - len(model.graph.inputs))),
    )


_Plan = tuple[Unit, Kind, Part]


def _plans(
    formed: FormedModel, units: Sequence[Unit], kinds: Collection[Kind], parts: bool
) -> tuple[dict[_Plan, dict[str, Form]], list[Unmeasured]]:
    """Forms of all ops for every trial, and the trials that are not possible."""
    found: dict[_Plan, dict[str, Form]] = {}
    unmeasured = []
    for unit in units:
        forms = {name: formed.full[name] for name in unit.ops}
        both = any(f.weight for f in forms.values()) and any(f.activation for f in forms.values())
        for part in ("all", "weight", "activation") if parts and both else ("all",):
            if "on" in kinds:
                found[unit, "on", part] = {name: _only(form, part) for name, form in forms.items()}
            if "off" in kinds:
                found[unit, "off", part] = formed.full | {name: _without(form, part) for name, form in forms.items()}
        if "int16" in kinds:
            for part, changed in _widened(formed, unit):
                if changed == forms:
                    continue
                if why := next(filter(None, (formed.refuses(name, changed[name]) for name in unit.ops)), ""):
                    unmeasured.append(Unmeasured(unit.name, f"int16 {part}", why))
                else:
                    found[unit, "int16", part] = formed.full | changed
    return found, unmeasured


def _widened(formed: FormedModel, unit: Unit) -> Iterator[tuple[Part, dict[str, Form]]]:
    """16 bits of activations and of weights apart: they are two settings, and few targets have the second."""
    for part in ("activation", "weight"):
        forms = {}
        for name in unit.ops:
            full, wide = formed.full[name], formed.widened(name)
            weights = part == "weight"
            forms[name] = Form(wide.weight if weights else full.weight, full.activation if weights else wide.activation)
        yield part, forms


def _only(form: Form, part: Part) -> Form:
    return Form(None if part == "activation" else form.weight, None if part == "weight" else form.activation)


def _without(form: Form, part: Part) -> Form:
    return FLOAT if part == "all" else _only(form, "activation" if part == "weight" else "weight")


def _trial(unit: Unit, kind: Kind, part: Part, seen: Distance, whole: Distance) -> Trial:
    share = seen.noise / whole.noise if whole.noise and math.isfinite(whole.noise) else math.nan
    return Trial(unit, kind, part, seen, share if kind == "on" else 1.0 - share)
