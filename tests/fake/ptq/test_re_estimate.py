"""Batch norm re-estimation: channels get back the mean and deviation that they have in float; the codes stay."""

from __future__ import annotations

import torch
from torch import Tensor

from qatlib.conversion import convert_fx
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.ptq.layers import float_reference
from qatlib.fake.ptq.re_estimate import re_estimate_batch_norms
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from tests.fake.ptq.nets import HELD_OUT, SEEN, prepared, sqnr_db

NORMS = ["stem", "second"]


def shrunk() -> tuple[FakeQuantModel, FakeQuantModel]:
    """A calibrated model whose quantized weights came out too small and off centre, and its float reference."""
    fake = prepared()
    reference = float_reference(fake)
    with torch.no_grad():
        for k, name in enumerate(NORMS):
            op = fake.op(name)
            op.weight.mul_(torch.linspace(0.7, 1.2, len(op.weight)).view(-1, 1, 1, 1))
            op.bias.add_(0.1 + 0.1 * k)
    return fake, reference


def codes(fake: FakeQuantModel, name: str) -> Tensor:
    op = fake.op(name)
    assert op.weight_fake_quant is not None
    return op.weight_fake_quant.codes(op.weight, op.weight_scales())


def test_mean_and_deviation_are_those_of_float_and_the_codes_stay() -> None:
    fake, reference = shrunk()
    before = {name: codes(fake, name) for name in NORMS}
    assert re_estimate_batch_norms(fake, reference, SEEN) == tuple(NORMS)
    x = torch.cat(SEEN)
    with torch.no_grad():
        # The first layer on the input as it is quantized, by torch alone.
        op, exact = fake.op("stem"), reference.op("stem")
        quantized = fake.op("x.quant")(x)
        made = torch.nn.functional.conv2d(quantized, op.weight, op.bias)
        wanted = torch.nn.functional.conv2d(x, exact.weight, exact.bias)
    torch.testing.assert_close(made.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=2e-2, rtol=0)
    torch.testing.assert_close(made.std((0, 2, 3)), wanted.std((0, 2, 3)), atol=0, rtol=1e-2)
    for name in NORMS:
        assert float((codes(fake, name) != before[name]).float().mean()) < 0.01


def test_the_network_gains_and_its_integers_follow() -> None:
    fake, reference = shrunk()
    with torch.no_grad():
        wanted, before = reference(HELD_OUT), fake(HELD_OUT)
        re_estimate_batch_norms(fake, reference, SEEN)
        after = fake(HELD_OUT)
    assert sqnr_db(wanted, after) > sqnr_db(wanted, before) + 5
    assert sqnr_db(after, convert_fx(fake)(HELD_OUT)) > 30


def test_a_network_that_loses_nothing_stays() -> None:
    from qatlib.fake.qconfig import FakeQuantSpec, QConfig

    fine = QConfig(FakeQuantSpec("int16", "min_max"), FakeQuantSpec("int16", "min_max"))
    fake = prepared(qconfig_dict={"": fine})
    before = {name: fake.op(name).weight.clone() for name in NORMS}
    re_estimate_batch_norms(fake, float_reference(fake), SEEN)
    for name in NORMS:
        torch.testing.assert_close(fake.op(name).weight, before[name], rtol=1e-3, atol=0)


def test_a_dead_channel_stays_and_kept_scales_move_with_their_weights() -> None:
    fake, reference = shrunk()
    with torch.no_grad():
        for side in (fake, reference):
            side.op("stem").weight[2] = 0.0
    op = fake.op("second")
    assert op.weight_fake_quant is not None
    scales, before = op.weight_scales().clone(), codes(fake, "second")
    with torch.no_grad():
        op.weight.copy_(before * scales.view(-1, 1, 1, 1))
    op.weight_fake_quant.fixed = scales
    re_estimate_batch_norms(fake, reference, SEEN)
    assert torch.equal(codes(fake, "second"), before)
    assert not fake.op("stem").weight[2].any()
    assert all(torch.isfinite(fake.op(name).weight).all() for name in NORMS)


def test_sums_of_16_bits_grow_with_the_weights() -> None:
    wide = FakeQuantSpec("int16", "min_max")
    fake = prepared(qconfig_dict=QConfig(wide, wide))
    reference = float_reference(fake)
    with torch.no_grad():
        fake.op(NORMS[0]).weight.mul_(0.6)
    scales = fake.op(NORMS[0]).weight_scales()
    before, seen = codes(fake, NORMS[0]).int(), fake.op(NORMS[0]).largest_sum.clone()
    assert float((scales > fake.op(NORMS[0]).weight_fake_quant.scales(fake.op(NORMS[0]).weight)).float().mean()) > 0.5
    re_estimate_batch_norms(fake, reference, SEEN)
    assert bool((fake.op(NORMS[0]).largest_sum > 1.5 * seen).all())
    assert int((codes(fake, NORMS[0]).int() - before).abs().max()) <= 1
