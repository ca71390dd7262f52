"""The float form of a fake-quant model: the float model's outputs, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from qatlib.fake.float_form import calibrated_form, float_form
from qatlib.fake.model import set_fake_quantize
from qatlib.fake.state import FakeQuantState
from tests.fake.training import clouds, state, trainer
from tests.models import calibrated, everything, images


def test_it_is_the_float_model() -> None:
    net, x = everything(), images(4)
    model = calibrated(net, x)
    with torch.no_grad():
        assert torch.allclose(float_form(model, x), net(x), atol=1e-5)
        assert not torch.allclose(calibrated_form(model, x), net(x), atol=1e-5)


@pytest.mark.parametrize("now", list(FakeQuantState))
@pytest.mark.parametrize("training", [True, False])
def test_state_mode_scales_and_observers_stay(now: FakeQuantState, training: bool) -> None:
    x = images(4)
    model = calibrated(everything(), x).train(training)
    set_fake_quantize(model, now)
    before, counted = state(model), [int(f.histogram.counts.sum()) for f in _fakes(model)]
    float_form(model, 3 * x)
    calibrated_form(model, 3 * x)
    assert (model.state, model.training) == (now, training)
    assert all(torch.equal(t, before[n]) for n, t in state(model).items())
    assert [int(f.histogram.counts.sum()) for f in _fakes(model)] == counted


def test_it_is_what_training_made_of_the_weights() -> None:
    one = trainer(epochs=1, note=str)
    one.run()
    weights = dict(one.model.named_parameters())
    x = clouds(2)[0]
    hidden = (x @ weights["hidden.weight"].T + weights["hidden.bias"]).relu()
    wanted = hidden @ weights["head.weight"].T + weights["head.bias"]
    assert torch.allclose(float_form(one.model, x), wanted, atol=1e-5)


def _fakes(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [op.activation_post_process for _, op in model.ops() if op.activation_post_process is not None]
