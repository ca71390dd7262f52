"""What rounding each unit alone does at the outputs, trial by trial, so that a search can stop between any two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from qatlib.analysis.batches import Batch, peek, samples_at_once
from qatlib.analysis.distance import noise, real_outputs
from qatlib.analysis.replay import Form, FormedModel, Replay
from qatlib.analysis.stats import check_finite
from qatlib.tune.front import Part
from qatlib.tune.space import Space
from qatlib.tune.state import State, Trial

_SAVED_AFTER = 16
"""Trials between two times that the state is saved."""


@dataclass(frozen=True)
class _Plan:
    """``forms`` of the ops of a unit while ``part`` of it alone is rounded."""

    unit: str
    part: Part
    ops: tuple[str, ...]
    forms: Mapping[str, Form]

    @property
    def key(self) -> str:
        return f"{self.part} of {self.unit}"


class Prediction:
    """Trials of all units of ``space``: those that have a choice first, their weights and outputs apart."""

    def __init__(self, space: Space) -> None:
        self._model, self._formed = space.model, FormedModel(space.model)
        with_choice = [unit for unit in space.units if unit.name in space.options]
        others = [unit for unit in space.units if unit.name not in space.options]
        self._options = space.options
        self._plans = [
            _Plan(unit.name, part, tuple(unit.ops), {name: _only(self._formed.full[name], part) for name in unit.ops})
            for unit in (*with_choice, *others)
            for part in self._parts(unit.ops, unit.name in space.options)
        ]

    def _parts(self, ops: Sequence[str], apart: bool) -> tuple[Part, ...]:
        forms = [self._formed.full[name] for name in ops]
        both = any(form.weight for form in forms) and any(form.activation for form in forms)
        return ("weight", "activation") if apart and both else ("all",)

    def missing(self, state: State) -> int:
        """How many trials are not there yet, or have not seen all batches."""
        return 0 if state.predicted else sum(not self._seen(state, plan).complete for plan in self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def run(self, data: Iterable[object], state: State, stop: Callable[[], bool], save: Callable[[], None]) -> None:
        """Go on where ``state`` ends, until all is seen or ``stop`` says so; that is asked before each trial.

        Raises TrainingError QAT165 for outputs that are not finite, DataError QAT118, QAT111 and QAT214.
        """
        if state.predicted:
            return
        batches, _ = peek(data, self._model.graph.inputs)
        most = samples_at_once(self._model.graph.nodes, self._model.graph.outputs)
        parts = list(chain.from_iterable(batch.parts(most) for batch in batches))
        try:
            for made, _ in enumerate(self._trials(parts, state, stop), start=1):
                if made % _SAVED_AFTER == 0:
                    save()
        finally:
            save()

    def _trials(self, parts: Sequence[Batch], state: State, stop: Callable[[], bool]) -> Iterator[None]:
        device = self._model.state_code.device
        for number, part in enumerate(parts):
            base: Replay | None = None
            for plan in self._plans:
                if (seen := self._seen(state, plan)).batches > number:
                    continue
                if stop():
                    return
                base = base or self._exact(part.to(device))
                leaves = base.variant(plan.ops, self._formed.computing(plan.forms))
                seen.add(_powers(base.outputs, leaves), last=number + 1 == len(parts))
                yield
        state.predicted = True

    def _exact(self, batch: Batch) -> Replay:
        base = Replay(self._formed.model, batch.inputs, self._formed.computing({}))
        for name, leaf in zip(self._model.graph.outputs, base.outputs, strict=True):
            check_finite(leaf, name)
        return base

    def noises(self, state: State) -> tuple[dict[str, dict[Part, float]], float]:
        """Noise of the parts of the units that have a choice, by what was seen so far, and that of all others.

        A unit of which a part is missing is left out.
        """
        found: dict[str, dict[Part, float]] = {}
        rest, partial = 0.0, set()
        for plan in self._plans:
            powers = self._seen(state, plan).powers
            if plan.unit not in self._options:
                rest += _mean_noise(powers) if powers else 0.0
            elif powers:
                found.setdefault(plan.unit, {})[plan.part] = _mean_noise(powers)
            else:
                partial.add(plan.unit)
        return {name: parts for name, parts in found.items() if name not in partial}, rest

    @staticmethod
    def _seen(state: State, plan: _Plan) -> Trial:
        return state.trials.setdefault(plan.key, Trial())


def _powers(reference: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Power of the error and of the reference, for each output of real numbers."""
    return [(float((b - a).square().sum()), float(a.square().sum())) for a, b in real_outputs(reference, leaves)]


def _mean_noise(powers: Sequence[tuple[float, float]]) -> float:
    return sum(noise(error, signal) for error, signal in powers) / len(powers)


def _only(form: Form, part: Part) -> Form:
    return Form(None if part == "activation" else form.weight, None if part == "weight" else form.activation)
