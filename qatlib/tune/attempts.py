"""What a choice of formats costs on the target, and what it scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatlib.analysis.batches import Batch, peek
from qatlib.analysis.distance import Meter
from qatlib.analysis.sensitivity import Kind, sensitivity
from qatlib.compiler import Target, check_model, compile_model
from qatlib.emulator import Emulator
from qatlib.errors import ProgramError, QConfigError
from qatlib.pipeline.project import Project
from qatlib.tune.front import losses
from qatlib.tune.space import Choice, Space
from qatlib.tune.state import Cost, Loss, Score, State

KINDS: tuple[Kind, ...] = ("on",)
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

    def study(self, state: State) -> None:
        """Predict the noise of every option, and score the float model."""
        data, groups = self._project.batches("val", PREDICTED_ON, PREDICTED_ON), self._space.groups
        seen = sensitivity(self._space.model, data, kinds=KINDS, groups=groups)
        found = losses(seen, self._space.options)
        state.losses = [
            Loss(unit=name, activation=option.activation, weight=option.weight, noise=noise)
            for name, options in found.items()
            for option, noise in options.items()
        ]
        state.rest = sum(t.distance.noise for t in seen.ranked("on") if t.unit.name not in found)
        state.float_metric = self._project.evaluate(self._project.float_model, "val", self._images).value

    def cost(self, choice: Choice) -> Cost:
        """Convert and compile."""
        try:
            program = self._space.program(choice)
        except (ProgramError, QConfigError) as error:
            return Cost(refused=str(error))
        if violations := check_model(program, self._target):
            return Cost(refused=str(violations[0]))
        executable = compile_model(program, self._target, self._project.config.compile.options)
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
