"""Which pairs of models may be compared at all: adjacent stages, in the right state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qatlib.analysis.batches import peek
from qatlib.analysis.records import STAGES_OF, Mode
from qatlib.analysis.sides import FakeSide, FloatSide, IntegerSide
from qatlib.emulator import Emulator
from qatlib.errors import ConfigError, StateError
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.graph.ir import Node
from qatlib.program import Program

_VALIDATION = "Call model.eval(), then set_fake_quantize(model, FakeQuantState.VALIDATION)"
CHECKED = 2
"""Samples on which two float models have to agree."""
TOLERANCE = 1e-3
"""Largest relative difference of outputs that folding batch norms may cause."""


def require_quantized(model: Any, where: str) -> FakeQuantModel:
    """``model`` if it is a FakeQuantModel that may be analysed as quantized, else StateError QAT155 or QAT156."""
    if not isinstance(model, FakeQuantModel):
        raise StateError(
            "QAT155",
            where,
            f"is a {type(model).__name__}, expected a calibrated FakeQuantModel",
            "Pass prepare_qat_fx's",
        )
    if model.state is not FakeQuantState.VALIDATION:
        behaves = "computes as the float model" if not model.state.quantizes else "moves its scales while it runs"
        raise StateError("QAT156", where, f"is in {model.state.name} state, in which it {behaves}", _VALIDATION)
    if model.training:
        raise StateError("QAT156", where, "is in train() mode", _VALIDATION)
    return model


def require_mode(mode: str) -> None:
    """Raise ConfigError (QAT108) for a mode that there is none."""
    if mode not in STAGES_OF:
        modes = ", ".join(f"{name} ({', '.join(stages)})" for name, stages in STAGES_OF.items())
        raise ConfigError("QAT108", "mode", f"{mode!r} is unknown", f"Use {modes}")


def require_untrained(model: FakeQuantModel, where: str) -> None:
    """Raise StateError (QAT157) if QAT moved the weights of ``model`` away from the float model's."""
    if model.trained:
        raise StateError(
            "QAT157",
            where,
            "was trained (QAT), so its weights are no longer those of the float model and every op differs by training",
            "Compare float with the calibrated model, that with its integers (CvsQ), and the QAT model with its integer"
            " form (mode QvsQ)",
        )


def emulator_of(model: Any, device: torch.device | None = None) -> Emulator:
    """The Emulator of a Program, of what convert_fx returned, or given, on ``device`` (default: its own, or the CPU).

    Raises StateError (QAT155) for anything else.
    """
    if isinstance(model, Emulator) and device in (None, model.device):
        return model
    program = model if isinstance(model, Program) else getattr(model, "program", None)
    if not isinstance(program, Program):
        raise StateError(
            "QAT155",
            "model2",
            f"is a {type(model).__name__}, expected an integer model",
            "Pass what convert_fx returned",
        )
    return Emulator(program, device or "cpu")


@dataclass(frozen=True)
class Neighbours:
    """Two adjacent models, one of them ``quantized``, and batches of inputs on their device."""

    reference: FloatSide | FakeSide
    other: FakeSide | IntegerSide
    quantized: FakeQuantModel
    batches: Iterator[tuple[Tensor, ...]]

    @property
    def nodes(self) -> Sequence[Node]:
        return self.quantized.graph.nodes


def neighbours(model1: Any, model2: Any, inputs: Any, mode: Mode) -> Neighbours:
    """The models of ``mode`` in the states it asks for; arguments and errors of :func:`.profiler.capture_pair`."""
    require_mode(mode)
    if mode == "FvsQ":
        quantized = require_quantized(model2, "model2")
        require_untrained(quantized, "model2")
        batches, first = peek(inputs, quantized.graph.inputs)
        device = quantized.state_code.device
        reference: FloatSide | FakeSide = FloatSide(float_view(model1, quantized, first.to(device).inputs))
        other: FakeSide | IntegerSide = FakeSide(quantized)
    else:
        quantized = require_quantized(model1, "model1")
        if mode == "CvsQ":
            require_untrained(quantized, "model1")
        device = quantized.state_code.device
        reference, other = FakeSide(quantized), IntegerSide(emulator_of(model2, device))
        batches, _ = peek(inputs, quantized.graph.inputs)
    return Neighbours(reference, other, quantized, (batch.to(device).inputs for batch in batches))


def float_view(model: nn.Module, quantized: FakeQuantModel, inputs: tuple[Tensor, ...]) -> FakeQuantModel:
    """The float model as a FakeQuantModel in CALIBRATION state: a copy, so that its observers see nothing new.

    ``model`` is that state itself, or the user's float model: then its outputs for ``inputs`` must agree with the float
    view of ``quantized``. Raises StateError QAT156 for a quantizing model and QAT158 for one of other weights.
    """
    if isinstance(model, FakeQuantModel):
        require_untrained(model, "model1")
        if model.state is not FakeQuantState.CALIBRATION:
            raise StateError(
                "QAT156",
                "model1",
                f"is in {model.state.name} state, so it is not the float model",
                "Pass the float model itself, or a copy in FakeQuantState.CALIBRATION",
            )
        return _copy(model).eval()
    view = _copy(quantized).eval()
    set_fake_quantize(view, FakeQuantState.CALIBRATION)
    _require_same_outputs(model, view, _first(inputs))
    return view


def _copy(model: FakeQuantModel) -> FakeQuantModel:
    """A copy on the same graph, which nothing changes."""
    shared = (model.graph, *model.graph.nodes)
    return deepcopy(model, {id(x): x for x in shared})


def _first(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A few samples of a batch."""
    sizes = {len(x) for x in inputs if x.dim()}
    return tuple(x[:CHECKED] for x in inputs) if len(sizes) == 1 and all(x.dim() for x in inputs) else inputs


def _require_same_outputs(model: nn.Module, view: FakeQuantModel, inputs: tuple[Tensor, ...]) -> None:
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            first, second = tree_leaves(model.eval()(*inputs)), tree_leaves(view(*inputs))
    finally:
        for module, training in modes.items():
            module.training = training
    if [a.shape for a in first] != [b.shape for b in second]:
        raise StateError(
            "QAT158",
            "model1",
            f"returns {len(first)} tensors and model2 {len(second)}, or of other shapes",
            "Compare model2 with the float model that it was prepared from",
        )
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(first, second, strict=True))
    if not worst <= TOLERANCE:
        raise StateError(
            "QAT158",
            "model1",
            f"and model2 with fake-quant off differ by {worst:.3g} of the largest output: not the same weights",
            "Compare model2 with the float model that it was prepared from",
        )
