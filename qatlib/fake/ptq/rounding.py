"""AdaRound (Nagel et al., 2020): whether each weight rounds up or down is learned, so that a layer's output is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlib.fake.fake_quant import WeightFakeQuantize
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.op import FakeOp
from qatlib.fake.ptq.layers import Batches, Reach, changing, layers, network_inputs
from qatlib.ops.base import BY_NAME
from qatlib.pipeline.config import AdaRoundParams
from qatlib.qtype import limits

ZETA, GAMMA = 1.1, -0.1
"""Ends of the stretched sigmoid, so that 0 and 1 are reached (Louizos et al., 2018)."""

Seen = Sequence[tuple[tuple[Tensor, ...], Tensor]]
"""Batch by batch: inputs of a layer as the quantized network gives them, the output that the float network makes."""


@dataclass(frozen=True)
class Rounding:
    """Mean squared error of a layer's output on the calibration data; share of weights not rounded to nearest."""

    name: str
    nearest: float
    learned: float
    changed: float


def adaround(
    model: FakeQuantModel, reference: FakeQuantModel, batches: Batches, params: AdaRoundParams, seed: int = 0
) -> tuple[Rounding, ...]:
    """Learn the rounding of every convolution's and linear's weights, layer by layer in the order of the network.

    Each layer reads what the quantized network before it gives (already rounded), and is held to the output of
    ``reference``, which computes in float, relu and addend included: the asymmetric reconstruction of the paper. The
    weights are left as ``codes * scale`` with the scale kept, so that they are quantized to exactly these codes from
    now on. Where learning does not beat rounding to nearest, that is taken. Weights that several calls share are left
    alone. Memory holds the inputs and outputs of one layer for all ``batches``. Raises DataError QAT110 for no batch.
    """
    done = []
    generator = torch.Generator().manual_seed(seed)
    with changing(model):
        for name in layers(model, "weight"):
            op, reach, goal = model.op(name), Reach(model, name), Reach(reference, name)
            seen = [
                (reach(inputs), reference.op(name).compute(*goal(inputs))) for inputs in network_inputs(model, batches)
            ]
            done.append(_round_layer(op, seen, params, generator))
    return tuple(done)


def _round_layer(op: FakeOp, seen: Seen, params: AdaRoundParams, generator: torch.Generator) -> Rounding:
    fake = op.weight_fake_quant
    assert fake is not None
    scales, weight, plain = op.weight_scales(), op.float_params()["weight"], op.quantized_params()
    unit = scales.view(-1, *[1] * (weight.dim() - 1))
    nearest, base = plain["weight"], (weight / unit).floor()
    before = _error(op, plain, seen)
    up = _learn(op, plain, seen, params, generator, unit, before) if before > 0 else None
    learned = nearest if up is None else (base + up).clamp_(*limits(fake.spec.dtype)) * unit
    after = _error(op, plain | {"weight": learned}, seen)
    if after >= before:
        learned, after = nearest, before
    changed = float((fake.codes(learned, scales) != fake.codes(nearest, scales)).float().mean())
    keep_codes(op, fake, learned, scales)
    return Rounding(op.node.name, before, after, changed)


def keep_codes(op: FakeOp, fake: WeightFakeQuantize, weight: Tensor, scales: Tensor) -> None:
    """Make ``weight``, multiples of ``scales`` ``[O]``, the weights of ``op``, and the scales theirs for good."""
    op.float_params()["weight"].copy_(weight)
    fake.fixed = scales.clone()


def _output(op: FakeOp, params: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    return BY_NAME[op.node.op].forward(op.node.attrs, params, *inputs)


def _error(op: FakeOp, params: Mapping[str, Tensor], seen: Seen) -> float:
    """Mean squared error over all batches."""
    total = sum(float((_output(op, params, inputs) - wanted).double().square().sum()) for inputs, wanted in seen)
    return total / sum(wanted.numel() for _, wanted in seen)


@torch.enable_grad()
def _learn(
    op: FakeOp,
    plain: Mapping[str, Tensor],
    seen: Seen,
    params: AdaRoundParams,
    generator: torch.Generator,
    unit: Tensor,
    nearest: float,
) -> Tensor:
    """1 where a weight rounds up, 0 where it rounds down.

    Objective: the squared error, relative to that of rounding to nearest, plus ``regularization`` times the mean of
    ``1 - |2 h - 1| ** beta``, which pushes every h to 0 or 1 as beta falls (equation 24 of the paper).
    """
    assert op.weight_fake_quant is not None
    qmin, qmax = limits(op.weight_fake_quant.spec.dtype)
    plain = {role: tensor.detach() for role, tensor in plain.items()}
    real = op.float_params()["weight"].detach() / unit
    base = real.floor()
    share = ((real - base - GAMMA) / (ZETA - GAMMA)).clamp(1e-4, 1 - 1e-4)
    v = torch.logit(share).requires_grad_()
    optimizer = torch.optim.Adam([v], params.lr)
    warm = int(params.warmup * params.steps)
    for step in range(params.steps):
        inputs, wanted = seen[int(torch.randint(len(seen), (), generator=generator))]
        h = (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        weight = (base + h).clamp(qmin, qmax) * unit
        loss = (_output(op, plain | {"weight": weight}, inputs) - wanted).square().mean() / nearest
        if step >= warm:
            part = (step - warm) / max(1, params.steps - warm)
            beta = params.beta[1] + (params.beta[0] - params.beta[1]) * (1 + math.cos(math.pi * part)) / 2
            loss = loss + params.regularization * (1 - (2 * h - 1).abs() ** beta).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return (v.detach() >= 0).to(unit)
