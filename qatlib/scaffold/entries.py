"""What the pipeline needs of this project. Fill in the functions that params.yaml names, then run: qatlib check"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset


def build_model() -> nn.Module:
    """Your float model as it was trained; its weights are loaded from model.checkpoint. Keywords: model.kwargs."""
    raise NotImplementedError("return your float model from build_model")


def build_data(split: str) -> Dataset[Any]:
    """Your data. Keywords: data.kwargs.

    ``split`` is train, calib, val or test; none shares an item with another, calib looks like train. An item is (input,
    target), the input a float32 tensor, integer ids or a tuple of these, without a batch axis, prepared as in training
    and best symmetric around 0.
    """
    raise NotImplementedError("return the Dataset of that split from build_data")


class Score:
    """A metric of your own, in place of accuracy: metric.factory. A fresh object is made for each evaluation."""

    name = "score"
    higher_is_better = True

    def __init__(self) -> None:
        raise NotImplementedError("write the metric Score, or name another in metric.factory")

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in one batch: what the model returned and the targets."""

    def compute(self) -> float:
        """The value over all batches so far."""
        return 0.0


def loss(outputs: Any, targets: Any) -> Tensor:
    """The loss of QAT, in place of cross entropy: qat.loss. Keywords: qat.loss_kwargs."""
    raise NotImplementedError("return the mean loss of the batch, or name another function in qat.loss")
