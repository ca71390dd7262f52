"""The one state of a fake-quant model."""

from __future__ import annotations

from enum import Enum


class FakeQuantState(Enum):
    """What every fake-quant module of a model does.

    CALIBRATION: observers on, fake-quant off; the forward equals the float model.
    QAT: observers and fake-quant on.
    VALIDATION: observers off, fake-quant on: the state to evaluate and analyse in.
    """

    CALIBRATION = "calibration"
    QAT = "qat"
    VALIDATION = "validation"

    @property
    def observes(self) -> bool:
        return self is not FakeQuantState.VALIDATION

    @property
    def quantizes(self) -> bool:
        return self is not FakeQuantState.CALIBRATION


class StateCell:
    """The state shared by a model and its fake-quant modules; only the model writes it."""

    def __init__(self) -> None:
        self.state = FakeQuantState.CALIBRATION
