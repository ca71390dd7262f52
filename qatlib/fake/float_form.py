"""A fake-quant model with its quantization left out: what its weights are worth in float."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.state import FakeQuantState


def float_form(model: FakeQuantModel, *inputs: Tensor) -> Any:
    """The forward of CALIBRATION state without its observers, in eval mode and without gradients.

    The model is left in the state and mode it had. Inputs and outputs are nested as in ``model(*inputs)``.
    """
    values = dict(zip(model.graph.inputs, inputs, strict=True))
    with torch.no_grad(), _in_state(model, FakeQuantState.CALIBRATION):
        values |= {node.name: out for node, _, out in model.float_steps(*inputs) if node.name in model.graph.outputs}
    return tree_unflatten([values[name] for name in model.graph.outputs], model.graph.structure)


def calibrated_form(model: FakeQuantModel, *inputs: Tensor) -> Any:
    """The forward of VALIDATION state, in eval mode and without gradients; the model is left as it was."""
    with torch.no_grad(), _in_state(model, FakeQuantState.VALIDATION):
        return model(*inputs)


@contextmanager
def _in_state(model: FakeQuantModel, state: FakeQuantState) -> Iterator[None]:
    before, modes = model.state, {module: module.training for module in model.modules()}
    try:
        model.eval()
        set_fake_quantize(model, state)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        set_fake_quantize(model, before)
