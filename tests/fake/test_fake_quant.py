"""fake_quantize in NumPy, its gradient, and what each state does to scales and results."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import QConfigError, StateError, TrainingError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.fake_quant import WeightFakeQuantize, fake_quantize
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.fake.state import FakeQuantState
from qatlib.fake.stubs import QuantStub
from qatlib.qtype import DEAD_SCALE
from tests.models import calibrated, everything, images, model

LIMITS = {"int8": (-128, 127), "int16": (-32768, 32767)}


def values(scale: float, reach: int) -> Tensor:
    """Random numbers, every half, both ends, and numbers next to them."""
    halves = torch.arange(-reach - 3, reach + 3).float().add(0.5).mul(scale)
    above, below = (torch.nextafter(halves, torch.tensor(end)) for end in (math.inf, -math.inf))
    return torch.cat([halves, above, below, torch.randn(2000) * scale * reach, torch.zeros(1), -torch.zeros(1)])


@pytest.mark.parametrize("scale", [0.1, 2.0**-7, 3.7e-5, 900.0])
@pytest.mark.parametrize(("dtype", "reach"), [("int8", 130), ("int16", 33000)])
def test_forward_and_gradient_against_numpy(dtype: str, reach: int, scale: float) -> None:
    qmin, qmax = LIMITS[dtype]
    step = np.float32(scale)
    x = values(scale, reach).requires_grad_()
    out = fake_quantize(x, torch.tensor(scale), dtype)
    codes = np.rint(x.detach().numpy() / step)
    np.testing.assert_array_equal(out.detach().numpy(), np.clip(codes, qmin, qmax) * step)
    upstream = torch.randn(x.shape)
    out.backward(upstream)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), np.where((codes >= qmin) & (codes <= qmax), upstream.numpy(), 0))


def test_scales_per_channel_broadcast() -> None:
    x, scale = torch.randn(5, 3, 2, 2), torch.rand(5) + 0.01
    out = fake_quantize(x, scale.view(-1, 1, 1, 1), "int8")
    for channel in range(5):
        assert torch.equal(out[channel], fake_quantize(x[channel], scale[channel], "int8"))


def test_the_largest_weight_of_a_channel_gets_its_gradient() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5], [1.0, -3.0, 0.5], [7.0, 0.0, 7.0]]).requires_grad_()
    fake = WeightFakeQuantize(FakeQuantSpec(), 3)
    out = fake.quantized(weight, fake.scales(weight))
    out.backward(torch.ones_like(out))
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(fake.codes(weight, fake.scales(weight))[:, :2], torch.tensor([[127, -42], [42, -128], [127, 0]]))


def test_weights_per_channel_with_a_dead_channel() -> None:
    weight = torch.randn(6, 4, 3, 3) * torch.logspace(-6, 3, 6).view(-1, 1, 1, 1)
    weight[2] = 0
    fake = WeightFakeQuantize(QConfig().weight)
    scales, codes = fake.scales(weight), fake.codes(weight, fake.scales(weight))
    for channel in range(6):
        largest = float(weight[channel].abs().max())
        wanted = np.float32(2 * largest / 255) if largest >= 2.0**-64 else np.float32(DEAD_SCALE)
        assert float(scales[channel]) == wanted
        np.testing.assert_array_equal(codes[channel], np.clip(np.rint(weight[channel].numpy() / wanted), -128, 127))
    assert codes[2].abs().max() == 0
    assert torch.equal(fake.quantized(weight, scales), codes.float() * scales.view(-1, 1, 1, 1))


# -- states ------------------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 3, groups=2, padding=1), "c": nn.Linear(384, 5)}

    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = F.relu6(s.a(x))
        return s.c(F.max_pool2d(torch.cat([s.b(y) + y], 1), 2).flatten(1))

    return model(body, **parts)


def scales(net: FakeQuantModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items() if name.endswith(".scale")}


def test_calibration_state_is_the_float_model_bit_for_bit() -> None:
    x = images(4)
    prepared = prepare_qat_fx(plain(), example_inputs=[x])
    assert prepared.state is FakeQuantState.CALIBRATION
    assert torch.equal(prepared(x), plain()(x))
    normed, net = prepare_qat_fx(everything(), example_inputs=[x]), everything()
    torch.testing.assert_close(normed(x), net(x), rtol=1e-5, atol=1e-5)


def test_validation_state_moves_nothing() -> None:
    net = calibrated(plain(), images(4))
    assert net.state is FakeQuantState.VALIDATION
    before = copy.deepcopy(net.state_dict())
    net.train()
    net(images(4) * 50).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("c", [0.0, 0.01, 0.3, 1.0])
def test_qat_state_moves_scales_by_the_averaging_constant(c: float) -> None:
    x, new = images(4), images(4, seed=9) * 3
    net = calibrated(plain(), x, qconfig_dict=QConfig(FakeQuantSpec(averaging_constant=c)))
    set_fake_quantize(net, FakeQuantState.QAT)
    before = scales(net)
    largest: dict[str, float] = {}
    for name, op in net.ops():
        if op.activation_post_process is not None:
            key = f"{name}.activation_post_process.scale"

            def note(_: nn.Module, args: tuple[Tensor, ...], key: str = key) -> None:
                seen = args[0].detach().clamp(0, 6) if key.startswith("a.") else args[0].detach()  # a relu6
                largest[key] = float(seen.abs().max())

            op.activation_post_process.register_forward_pre_hook(note)
    net(new)
    assert largest.keys() == before.keys()
    for name, after in scales(net).items():
        current = 2 * largest[name] / 255
        wanted = (1 - c) * float(before[name]) + c * current
        assert float(after) == pytest.approx(wanted, rel=1e-6)
        if c == 0:
            assert torch.equal(after, before[name])
        else:
            assert not torch.equal(after, before[name])


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_an_activation_that_is_not_finite_is_named_and_moves_no_scale(wrong: float) -> None:
    net = calibrated(plain(), images(4))
    set_fake_quantize(net, FakeQuantState.QAT)
    with torch.no_grad():
        net.op("b").bias[2] = wrong
    before = scales(net)
    with pytest.raises(TrainingError, match="QAT161 b: activation is not finite in training"):
        net(images(4))
    assert torch.equal(scales(net)["b.activation_post_process.scale"], before["b.activation_post_process.scale"])


def test_int16_follows_its_own_range() -> None:
    net = calibrated(
        plain(), images(2), qconfig_dict=QConfig(FakeQuantSpec("int16", "min_max", averaging_constant=1.0))
    )
    set_fake_quantize(net, FakeQuantState.QAT)
    x = images(2, seed=5)
    net(x)
    assert net.qtype("x.quant").scale == pytest.approx(2 * float(x.abs().max()) / 65535, rel=1e-6)


def test_weights_and_bias_are_the_integers_of_the_accumulator() -> None:
    net = calibrated(plain(), images(4))
    op = net.op("a")
    assert op.weight_fake_quant is not None
    unit = op.weight_fake_quant.scales(op.weight) * net.qtype("x.quant").scale
    params = op.quantized_params()
    codes = params["bias"] / unit
    torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-3)
    assert float((params["bias"] - op.bias).detach().abs().sub(unit / 2 * 1.001).max()) <= 0
    params["bias"].sum().backward()
    assert torch.equal(op.bias.grad, torch.ones(6)), "the gradient passes the rounding"


def test_a_fixed_scale_stays_in_every_state() -> None:
    net = prepare_qat_fx(
        model(lambda s, x: s.c(s.q(x)), q=QuantStub(scale=1 / 128), c=nn.Conv2d(3, 2, 1)), example_inputs=[images(1)]
    )
    calibrate(net, [images(2) * 40])
    set_fake_quantize(net, FakeQuantState.QAT)
    net(images(2) * 7)
    assert net.qtype("q").scale == 1 / 128
    assert "fixed" in repr(net.op("q"))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-40])
def test_a_fixed_scale_has_to_be_one(scale: float) -> None:
    with pytest.raises(QConfigError, match="QAT140"):
        FakeQuantSpec(scale=scale)


def test_a_dead_tensor_has_the_dead_scale_and_stays_zero() -> None:
    net = model(lambda s, x: s.d(F.relu(s.c(x))), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        net.c.weight.zero_()
        net.c.bias.fill_(-1)
    quantized = calibrated(net, images(2))
    assert quantized.qtype("c").scale == DEAD_SCALE
    torch.testing.assert_close(quantized(images(2)), net(images(2)))


@pytest.mark.parametrize("state", [FakeQuantState.QAT, FakeQuantState.VALIDATION])
def test_quantizing_needs_scales(state: FakeQuantState) -> None:
    net = prepare_qat_fx(plain(), example_inputs=[images(1)])
    with pytest.raises(StateError, match=r"QAT150 x\.quant: 4 of 7 ops have no scale") as caught:
        set_fake_quantize(net, state)
    assert "Calibrate" in caught.value.fix
    assert net.state is FakeQuantState.CALIBRATION


def test_state_and_scales_survive_a_state_dict_and_a_copy() -> None:
    net = calibrated(plain(), images(4))
    set_fake_quantize(net, FakeQuantState.QAT)
    net.mark_trained()
    other = prepare_qat_fx(plain(), example_inputs=[images(1)])
    other.load_state_dict(net.state_dict())
    assert other.state is FakeQuantState.QAT
    assert other.trained
    twin = copy.deepcopy(net)
    set_fake_quantize(twin, FakeQuantState.VALIDATION)
    assert net.state is FakeQuantState.QAT, "a copy has its own state"
    set_fake_quantize(net, FakeQuantState.VALIDATION)
    set_fake_quantize(other, FakeQuantState.VALIDATION)
    x = images(2, seed=3)
    assert torch.equal(net(x), twin(x))
    assert torch.equal(net(x), other(x))
    with torch.no_grad():
        twin.op("a").weight.add_(1.0)
    assert not torch.equal(net(x), twin(x))


def test_a_loader_without_batches() -> None:
    with pytest.raises(ValueError, match="QAT110"):
        calibrate(prepare_qat_fx(plain(), example_inputs=[images(1)]), [])
