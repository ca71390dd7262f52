"""Batch norm re-estimation: the statistics of folded batch norms, measured again on the quantized network.

A batch norm normalizes by the mean and deviation that the *float* network had; with rounded inputs and weights its
channels have others. Batch norms are folded here, so the layer itself is given new weights and bias, which per-channel
weight scales make the same as a batch norm with new statistics: the weight codes stay, their scale and the bias move.

The statistics aimed at are those of the float network on the same data, not the running ones that were folded: what
both have in common, a calibration split that differs from the training data, then cancels, and a network that loses
nothing to rounding is left as it is. Measuring the float network's batch norms anew instead, before it is traced, would
change the float function that everything is compared with, and know nothing of the rounding.
"""

from __future__ import annotations

import torch

from qatlib.fake.model import FakeQuantModel
from qatlib.fake.op import FakeOp
from qatlib.fake.ptq.layers import Batches, changing, float_moments, layers, quantized_moments

LARGEST = 2.0
"""Bound of the factor on a channel's deviation: beyond it, the channel is lost rather than changed."""


def re_estimate_batch_norms(model: FakeQuantModel, reference: FakeQuantModel, batches: Batches) -> tuple[str, ...]:
    """Give layers with a folded batch norm the mean and deviation per channel that they have in float on ``batches``.

    Before its relu and without what is added to it, in the order of the network, as
    :func:`qatlib.fake.ptq.correct.correct_biases`. Returns the names of the layers; those that share parameters with
    another call are left alone. Raises DataError QAT110 for no batch.
    """
    with changing(model):
        names = [name for name in layers(model, "weight", "bias") if _has_batch_norm(model.op(name))]
        wanted = float_moments(reference, names, batches, addend=False)
        for name in names:
            op, goal = model.op(name), wanted[name]
            seen = quantized_moments(model, name, batches, addend=False)
            dead = (seen.deviation == 0) | (goal.deviation == 0)
            factor = torch.where(dead, 1.0, goal.deviation / seen.deviation).clamp(1 / LARGEST, LARGEST)
            weight, bias = (op.float_params()[role] for role in ("weight", "bias"))
            weight.mul_(factor.to(weight).view(-1, *[1] * (weight.dim() - 1)))
            bias.copy_((factor * (bias.double() - seen.mean) + goal.mean).to(bias))
            fake = op.weight_fake_quant
            if fake is not None:
                fake.rescale(factor)
                if fake.fixed is not None:
                    fake.fixed.mul_(factor.to(fake.fixed))
            if hasattr(op, "largest_sum"):  # sums grow with the weights
                op.largest_sum.mul_(factor.to(op.largest_sum))
    return tuple(names)


def _has_batch_norm(op: FakeOp) -> bool:
    return any(node.op == "batch_norm" for node in op.node.fused)
