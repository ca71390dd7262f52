"""How a network that names one class is scored: by its labels, and by how often another form of it names the same."""

from __future__ import annotations

from torch import Tensor

from qatlib.pipeline.metrics import Accuracy


class Agreement:
    """Share of the inputs on which two networks give the same class; targets are the other's scores ``[N, C]``."""

    name = "agreement"
    higher_is_better = True

    def __init__(self) -> None:
        self._accuracy = Accuracy()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._accuracy.update(outputs, targets.argmax(1))

    def compute(self) -> float:
        return self._accuracy.compute()


METRICS = (Accuracy,)
RELATIVE = (Agreement,)


def against(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets of :class:`Agreement` with the network that gave ``outputs``."""
    return outputs
