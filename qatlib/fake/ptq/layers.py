"""One convolution or linear of a calibrated model at a time: what it reads, and what it makes before it is rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from qatlib.errors import DataError
from qatlib.fake.calibrate import inputs_of
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.op import FakeOp
from qatlib.fake.state import FakeQuantState
from qatlib.graph.fuse import DENSE
from qatlib.ops.base import BY_NAME

Batches = Iterable[Any]
"""As for calibration; it is gone through once per layer."""


def float_reference(model: FakeQuantModel) -> FakeQuantModel:
    """A copy of ``model`` with its present weights that computes in float."""
    reference = deepcopy(model).eval()
    set_fake_quantize(reference, FakeQuantState.CALIBRATION)
    return reference


def layers(model: FakeQuantModel, *roles: str) -> list[str]:
    """Names of the quantized convolutions and linears whose parameters ``roles`` no other operator shares."""
    uses = Counter(id(tensor) for _, op in model.ops() for tensor in op.parameters(recurse=False))
    return [
        name
        for name, op in model.ops()
        if op.node.op in DENSE
        and op.weight_fake_quant is not None
        and all(uses[id(getattr(op, role))] == 1 for role in roles)
    ]


def before_clamp(model: FakeQuantModel, name: str, *inputs: Tensor) -> Tensor:
    """Output of a convolution or linear in the model's state, without its clamp and its quantizer."""
    op = model.op(name)
    params = op.quantized_params() if model.state.quantizes else op.float_params()
    attrs = {key: value for key, value in op.node.attrs.items() if key != "clamp"}
    return BY_NAME[op.node.op].forward(attrs, params, *inputs)


class Moments:
    """Mean and standard deviation of every output channel, in one pass."""

    def __init__(self, op: FakeOp) -> None:
        self._axis: int = BY_NAME[op.node.op].channel_axis  # type: ignore[attr-defined]
        self._count = 0
        self._sums: list[Tensor | float] = [0.0, 0.0]

    def add(self, out: Tensor) -> None:
        rows = out.movedim(self._axis, 0).flatten(1).double()
        self._count += rows.shape[1]
        for power in (1, 2):
            self._sums[power - 1] += rows.pow(power).sum(1)

    @property
    def mean(self) -> Tensor:
        """float64 ``[O]``."""
        return torch.as_tensor(self._sums[0]) / self._count

    @property
    def deviation(self) -> Tensor:
        """float64 ``[O]``."""
        square = torch.as_tensor(self._sums[1]) / self._count
        return (square - self.mean.square()).clamp(min=0).sqrt()


def float_moments(
    reference: FakeQuantModel, names: Sequence[str], batches: Batches, addend: bool
) -> dict[str, Moments]:
    """Moments of the named layers in float before their clamp, with or without what is added to them."""
    found = {name: Moments(reference.op(name)) for name in names}
    for inputs in network_inputs(reference, batches):
        values = dict(zip(reference.graph.inputs, inputs, strict=True))
        for name, op in reference.ops():
            given = tuple(values[i] for i in op.node.inputs)
            values[name] = op.compute(*given)
            if name in found:
                found[name].add(before_clamp(reference, name, *(given if addend else given[:1])))
    return found


def quantized_moments(model: FakeQuantModel, name: str, batches: Batches, addend: bool) -> Moments:
    """Moments of one layer as the model now is, likewise."""
    found, reach = Moments(model.op(name)), Reach(model, name)
    for inputs in network_inputs(model, batches):
        given = reach(inputs)
        found.add(before_clamp(model, name, *(given if addend else given[:1])))
    return found


class Reach:
    """The inputs of one operator for inputs of the network; only what leads to it is computed."""

    def __init__(self, model: FakeQuantModel, target: str) -> None:
        self.model, self.target = model, target
        self._needed = set(model.op(target).node.inputs)
        for name, op in reversed(list(model.ops())):
            if name in self._needed:
                self._needed.update(op.node.inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Observers see nothing: in CALIBRATION state the operators compute without their quantizers."""
        values = dict(zip(self.model.graph.inputs, inputs, strict=True))
        for name, op in self.model.ops():
            if name in self._needed:
                given = (values[i] for i in op.node.inputs)
                values[name] = op(*given) if self.model.state.quantizes else op.compute(*given)
        return tuple(values[i] for i in self.model.op(self.target).node.inputs)


def network_inputs(model: FakeQuantModel, batches: Batches) -> Iterator[tuple[Tensor, ...]]:
    """Inputs of the model of every batch, on its device. Raises DataError QAT110 if there is none."""
    device, none = next(iter(model.buffers())).device, True
    for batch in batches:
        none = False
        yield tuple(x.to(device) for x in inputs_of(batch, model.graph.inputs))
    if none:
        raise DataError("QAT110", "calibration", "the loader gave no batch", "Check the split and its size")


@contextmanager
def changing(model: FakeQuantModel) -> Iterator[None]:
    """No gradients, and VALIDATION state and eval mode, in which the effect of a change is seen."""
    model.eval()
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    with torch.no_grad():
        yield
