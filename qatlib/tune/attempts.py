"""What a choice of formats costs on the target, and what it scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlib.analysis.batches import Batch, peek
from qatlib.analysis.distance import Meter
from qatlib.compiler import Target, try_compile
from qatlib.emulator import Emulator
from qatlib.errors import ProgramError, QConfigError
from qatlib.pipeline.project import Project
from qatlib.tune.front import losses
from qatlib.tune.prediction import Prediction
from qatlib.tune.space import Choice, Option, Space
from qatlib.tune.state import Cost, Score, State

PREDICTED_ON = 32
"""Validation images behind a prediction."""


@dataclass(frozen=True)
class _Reference:
    batch: Batch
    leaves: tuple[Tensor, ...]


class Attempts:
    """Makes and measures choices of ``space`` for ``target``, on the first ``images`` of the validation split."""

    def __init__(self, project: Project, space: Space, target: Target, images: int) -> None:
        self._project, self._space, self._target, self._images = project, space, target, images
        self._references: list[_Reference] = []
        self.prediction = Prediction(space)

    def float_metric(self) -> float:
        """Score of the float model."""
        return self._project.evaluate(self._project.float_model, "val", self._images).value

    def predict(self, state: State, stop: Callable[[], bool], save: Callable[[], None]) -> None:
        """Go on with the trials behind :meth:`losses`; see :meth:`Prediction.run`."""
        self.prediction.run(self._project.batches("val", PREDICTED_ON, PREDICTED_ON), state, stop, save)

    def losses(self, state: State) -> tuple[dict[str, dict[Option, float]], float]:
        """Predicted noise of every option of the units tried so far, and of what has no option."""
        noises, rest = self.prediction.noises(state)
        return losses(noises, self._space.options), rest

    def cost(self, choice: Choice) -> Cost:
        """Convert and compile."""
        try:
            program = self._space.program(choice)
        except (ProgramError, QConfigError) as error:
            return Cost(refused=str(error))
        executable, violations = try_compile(program, self._target, self._project.config.compile.options)
        if executable is None:
            return Cost(refused=str(violations[0]))
        seen, memory = executable.performance, executable.memory
        return Cost(latency_us=seen.latency_us, dram_bytes=seen.dram_bytes, sram_peak_bytes=memory.sram.peak_bytes)

    def score(self, choice: Choice) -> Score:
        """Emulate the integers; outputs of a network without rounding are what they should be."""
        program, device = self._space.program(choice), self._project.device
        if not self._references:
            self._references = list(self._refer())
        emulator, meter = Emulator(program, device), Meter(self._project.metric)
        for reference in self._references:
            with torch.no_grad():
                leaves = emulator(*reference.batch.inputs)
            meter.add(reference.leaves, leaves, program.nest(leaves), reference.batch.targets)
        result = meter.result()
        assert result.metric is not None
        return Score(noise=result.noise, metric=result.metric)

    def _refer(self) -> list[_Reference]:
        data, _ = peek(self._project.batches("val", self._images), self._space.model.graph.inputs)
        batches = (batch.to(self._project.device) for batch in data)
        return [_Reference(batch, self._space.unrounded(batch.inputs)) for batch in batches]
