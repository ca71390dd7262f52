"""Bias correction: the mean of every channel is what it is in float, and the integers follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qatlib.conversion import convert_fx
from qatlib.errors import DataError
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.ptq.correct import correct_biases
from qatlib.fake.ptq.layers import float_reference
from qatlib.ops.base import BY_NAME
from tests.fake.ptq.nets import HELD_OUT, LAYERS, SEEN, layered, prepared, sqnr_db
from tests.models import model


def coarse(net: nn.Module | None = None) -> FakeQuantModel:
    """Weights of one bit or two, so that their rounding shifts every mean."""
    fake = prepared(net)
    for _, op in fake.ops():
        if op.weight_fake_quant is not None:
            op.weight_fake_quant.fixed = op.weight.detach().abs().flatten(1).amax(1) / 1.6
    return fake


def means(fake: FakeQuantModel, x: Tensor) -> dict[str, Tensor]:
    """Per channel, before relu and quantizer, one batch."""
    found: dict[str, Tensor] = {}

    def visit(node: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = node.name  # type: ignore[attr-defined]
        if name in LAYERS:
            op = fake.op(name)
            params = op.quantized_params() if fake.state.quantizes else op.float_params()
            attrs = {**op.node.attrs, "clamp": None}
            out = BY_NAME[op.node.op].forward(attrs, params, *inputs)
            found[name] = out.mean([axis for axis in range(out.dim()) if axis != 1])

    with torch.no_grad():
        fake.walk(x, visit=visit)
    return found


def test_the_mean_of_every_channel_is_that_of_float() -> None:
    fake, x = coarse(), torch.cat(SEEN)
    reference = float_reference(fake)
    wanted, before = means(reference, x), means(fake, x)
    made = correct_biases(fake, reference, SEEN)
    after = means(fake, x)
    assert [one.name for one in made] == LAYERS
    for name in LAYERS:
        was, now = ((seen[name] - wanted[name]).abs().max() for seen in (before, after))
        assert float(was) > 0.02, name
        unit = float((fake.op(name).weight_scales() * fake.quantizer(fake.op(name).node.inputs[0]).scale).max())
        assert float(now) < 1e-4 + unit, name  # the bias is a multiple of the accumulator's unit


def test_held_out_data_gain_and_the_integers_follow() -> None:
    fake = coarse()
    reference = float_reference(fake)
    with torch.no_grad():
        wanted, before = reference(HELD_OUT), fake(HELD_OUT)
        correct_biases(fake, reference, SEEN)
        after = fake(HELD_OUT)
    assert sqnr_db(wanted, after) > sqnr_db(wanted, before) + 2
    assert sqnr_db(after, convert_fx(fake)(HELD_OUT)) > 30


def test_the_reference_and_the_weights_stay() -> None:
    fake = coarse()
    reference = float_reference(fake)
    kept = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    weights = {name: fake.op(name).weight.clone() for name in LAYERS}
    correct_biases(fake, reference, SEEN)
    assert all(torch.equal(kept[name], tensor) for name, tensor in reference.state_dict().items())
    assert all(torch.equal(weights[name], fake.op(name).weight) for name in LAYERS)
    assert not fake.trained


def test_a_bias_of_several_calls_and_a_float_layer_are_left_alone() -> None:
    net = model(lambda s, x: s.last(s.twice(s.twice(x))), twice=nn.Conv2d(3, 3, 1), last=nn.Conv2d(3, 2, 1))
    fake = prepared(net)
    assert [one.name for one in correct_biases(fake, float_reference(fake), SEEN)] == ["last"]
    partly = prepared(layered(), hybrid=True, hybrid_dict={"module_name": ["up"]})
    assert "up" not in [one.name for one in correct_biases(partly, float_reference(partly), SEEN)]


def test_no_data_is_an_error() -> None:
    fake = prepared()
    with pytest.raises(DataError, match="QAT110"):
        correct_biases(fake, float_reference(fake), [])
