"""Calibration: show data to the observers, then set every scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qatlib.errors import DataError, TrainingError
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.state import FakeQuantState


def calibrate(model: FakeQuantModel, dataloader: Iterable[Any], device: str | torch.device = "cpu") -> int:
    """Set the scales of ``model`` from all batches of ``dataloader``; leave it in eval mode and VALIDATION state.

    A batch is a tensor, or a tuple whose first entries are the model's inputs (one tuple of inputs is fine too).
    Returns the number of samples. Memory does not depend on the number of batches. Raises DataError (QAT110) for an
    empty loader and TrainingError (QAT160) at the first operator whose output is not finite.
    """
    model.to(device).eval()
    for _, op in model.ops():
        op.forget()
        if op.activation_post_process is not None:
            op.activation_post_process.forget()
    set_fake_quantize(model, FakeQuantState.CALIBRATION)
    samples = 0
    with torch.no_grad():
        for batch in dataloader:
            inputs = tuple(x.to(device) for x in inputs_of(batch, len(model.graph.inputs)))
            check_finite(model, model(*inputs))
            samples += inputs[0].shape[0]
    if not samples:
        raise DataError("QAT110", "calibration", "the loader gave no batch", "Check the split and its size")
    settle(model)
    return samples


def check_finite(model: FakeQuantModel, outputs: Any) -> None:
    """Raise TrainingError (QAT160) for an output that is not finite; outputs in high precision have no observer."""
    for name, out in zip(model.graph.outputs, tree_leaves(outputs), strict=True):
        bad = int((~torch.isfinite(out)).sum())
        if bad:
            raise TrainingError(
                "QAT160",
                name,
                f"output holds {bad} non-finite of {out.numel()} elements",
                "Check the float model and the data with float-check",
            )


def settle(model: FakeQuantModel) -> None:
    """Turn what the observers saw into scales and enter VALIDATION."""
    for _, op in model.ops():
        if op.activation_post_process is not None:
            op.activation_post_process.settle()
    set_fake_quantize(model, FakeQuantState.VALIDATION)


def inputs_of(batch: Any, count: int) -> tuple[Tensor, ...]:
    """The model's ``count`` input tensors of a batch."""
    if isinstance(batch, Tensor):
        return (batch,)
    first = batch[0]
    return tuple(first) if isinstance(first, tuple | list) else tuple(batch[:count])
