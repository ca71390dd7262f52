"""How near an integer network is to the float network, and how often it is right; and the loss for QAT.

Targets are the collated :class:`examples.efficientnet_lite0.data.Target`: labels ``[N]``, float logits ``[N, 1000]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qatlib.errors import DataError
from qatlib.pipeline.metrics import Accuracy

Targets = Mapping[str, Tensor]


class Agreement:
    """Share of the inputs on which the class is the one that the float network gives."""

    name = "agreement"
    higher_is_better = True

    def __init__(self) -> None:
        self._accuracy = Accuracy()

    def update(self, outputs: Tensor, targets: Targets) -> None:
        self._accuracy.update(outputs, targets["float"].to(outputs.device).argmax(1))

    def compute(self) -> float:
        return self._accuracy.compute()


class LabelAccuracy:
    """Share of the labelled inputs whose label has the highest score."""

    name = "label_accuracy"
    higher_is_better = True

    def __init__(self) -> None:
        self._accuracy = Accuracy()

    def update(self, outputs: Tensor, targets: Targets) -> None:
        labels = targets["label"].to(outputs.device)
        labelled = labels >= 0
        if bool(labelled.any()):
            self._accuracy.update(outputs[labelled], labels[labelled])

    def compute(self) -> float:
        return self._accuracy.compute()


class LogitSqnr:
    """Signal to quantization noise of the logits, in dB: ``10 log10(sum f² / sum (f - q)²)``, over all inputs.

    Noise below one part in 2^48 of the power, which float32 cannot tell from rounding, counts as that: 144.5 dB.
    """

    name = "logit_sqnr_db"
    higher_is_better = True

    def __init__(self) -> None:
        self._signal, self._noise = 0.0, 0.0

    def update(self, outputs: Tensor, targets: Targets) -> None:
        expected = targets["float"].to(outputs.device).double()
        self._signal += float(expected.square().sum())
        self._noise += float((expected - outputs.double()).square().sum())

    def compute(self) -> float:
        if self._signal == 0:
            raise DataError("QAT110", self.name, "has seen no items", "Evaluate at least one batch")
        return 10 * math.log10(self._signal / max(self._noise, self._signal * 2**-48))


def distillation(outputs: Tensor, targets: Targets) -> Tensor:
    """Cross-entropy with the float network's probabilities: it needs no labels (Hinton et al., 2015)."""
    return F.cross_entropy(outputs, torch.softmax(targets["float"].to(outputs.device), 1))


METRICS = (Agreement, LabelAccuracy, LogitSqnr)
RELATIVE = (Agreement, LogitSqnr)


def against(targets: Targets, outputs: Tensor) -> Targets:
    """Targets with the network that gave ``outputs`` in the place of the float network."""
    return {**targets, "float": outputs}
