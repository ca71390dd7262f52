"""AdaRound: a layer's output is nearer to float's than by rounding to nearest, on data that it did not learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatlib.conversion import convert_fx
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.ptq.layers import Reach, float_reference
from qatlib.fake.ptq.rounding import Rounding, adaround
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.pipeline.config import AdaRoundParams
from tests.fake.ptq.nets import HELD_OUT, LAYERS, prepared, sqnr_db
from tests.models import images

MANY = (images(256, seed=5) + 0.5).split(16)
INT16 = {"": QConfig(FakeQuantSpec("int16", "min_max"))}
"""Of activations: what is lost is lost by the weights."""


@pytest.fixture(scope="module")
def learned() -> tuple[FakeQuantModel, FakeQuantModel, tuple[Rounding, ...]]:
    fake = prepared(qconfig_dict=INT16)
    reference = float_reference(fake)
    return fake, reference, adaround(fake, reference, MANY, AdaRoundParams(steps=150, lr=4e-2))


def output_error(fake: FakeQuantModel, reference: FakeQuantModel, name: str, weight: Tensor) -> float:
    """Mean squared error of a layer on held-out data with ``weight`` in place of its own, on its quantized inputs."""
    op = fake.op(name)
    with torch.no_grad():
        kept = op.weight.clone()
        op.weight.copy_(weight)
        made = op.compute(*Reach(fake, name)((HELD_OUT,)))
        op.weight.copy_(kept)
        wanted = reference.op(name).compute(*Reach(reference, name)((HELD_OUT,)))
    return float((made - wanted).square().mean())


def test_codes_are_the_floor_or_one_above_and_beat_nearest_on_held_out_data(learned: Any) -> None:
    fake, reference, done = learned
    assert [one.name for one in done] == LAYERS
    better = 0
    for one in done:
        op, weight = fake.op(one.name), reference.op(one.name).weight.detach()
        scales = op.weight_scales()
        largest = weight.abs().flatten(1).amax(1).double().numpy()
        np.testing.assert_allclose(scales.double().numpy(), largest * 2 / 255, rtol=1e-6)
        unit = scales.view(-1, *[1] * (weight.dim() - 1))
        codes = op.weight_fake_quant.codes(op.weight, scales).int()
        floor = (weight / unit).floor().int()
        step = codes - floor
        assert bool(((step == 0) | (step == 1) | ((step == -1) & (codes == 127)) | (codes == 127)).all())
        assert torch.equal(op.weight.detach(), codes * unit)
        nearest = (weight / unit).round().clamp(-128, 127) * unit
        assert one.learned <= one.nearest
        assert one.changed == pytest.approx(float((codes != (nearest / unit).round().int()).float().mean()), abs=1e-6)
        better += output_error(fake, reference, one.name, op.weight) < output_error(fake, reference, one.name, nearest)
    assert better >= 4
    assert sum(one.learned for one in done) < 0.9 * sum(one.nearest for one in done)


def test_the_network_gains_on_held_out_data_and_the_integers_follow(learned: Any) -> None:
    fake, reference, _ = learned
    plain = prepared(qconfig_dict=INT16)
    with torch.no_grad():
        wanted, before, after = reference(HELD_OUT), plain(HELD_OUT), fake(HELD_OUT)
    assert sqnr_db(wanted, after) > sqnr_db(wanted, before) + 1
    program = convert_fx(fake).program
    for name in LAYERS:
        op = fake.op(name)
        kept = program.constants[f"{name}.weight"]
        assert torch.equal(kept, op.weight_fake_quant.codes(op.weight, op.weight_scales()).cpu())
    assert sqnr_db(after, convert_fx(fake)(HELD_OUT)) > 60


def test_the_same_seed_gives_the_same_codes() -> None:
    weights = []
    for _ in range(2):
        fake = prepared()
        adaround(fake, float_reference(fake), MANY[:3], AdaRoundParams(steps=10, lr=0.2), seed=3)
        weights.append([fake.op(name).weight for name in LAYERS])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_beta_has_to_fall() -> None:
    with pytest.raises(ValueError, match="where it starts"):
        AdaRoundParams(beta=(2.0, 20.0))
