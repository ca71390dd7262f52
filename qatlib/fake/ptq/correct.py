"""Bias correction (Nagel et al., 2019): rounding shifts the mean of a channel, and the bias takes the shift back."""

from __future__ import annotations

from dataclasses import dataclass

from qatlib.fake.model import FakeQuantModel
from qatlib.fake.ptq.layers import Batches, changing, float_moments, layers, quantized_moments


@dataclass(frozen=True)
class Correction:
    """Largest shift of a channel's mean that was taken back, in standard deviations of the layer's float output."""

    name: str
    shift: float


def correct_biases(model: FakeQuantModel, reference: FakeQuantModel, batches: Batches) -> tuple[Correction, ...]:
    """Add ``E[float output] - E[fake-quant output]``, per channel over ``batches``, to every convolution's and linear's
    bias.

    The outputs are those before relu and quantizer, with what is added to them. Layers go in the order of the network,
    so that each sees its inputs as they are after the corrections before it: one pass over the data up to that layer
    each. ``reference`` computes in float (:func:`qatlib.fake.ptq.layers.float_reference`); ``model`` is calibrated. A
    bias that several calls share is left alone. Raises DataError QAT110 for no batch.
    """
    made = []
    with changing(model):
        names = layers(model, "bias")
        wanted = float_moments(reference, names, batches, addend=True)
        for name in names:
            shift = wanted[name].mean - quantized_moments(model, name, batches, addend=True).mean
            bias = model.op(name).float_params()["bias"]
            bias.copy_((bias.double() + shift).to(bias))
            typical = float(wanted[name].deviation.square().mean().sqrt())
            made.append(Correction(name, float(shift.abs().max()) / typical if typical else 0.0))
    return tuple(made)
