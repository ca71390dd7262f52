"""The loss guard: what is recorded, when it warns, and scales that no calibration gives."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qatlib.errors import StateError, TrainingError
from qatlib.fake.first_loss import FirstLoss, check_calibrated
from qatlib.fake.prepare import prepare_qat_fx
from tests.fake.training import STEPS, batches, clouds, start, state, trainer
from tests.models import Tiny

QUIET: dict[str, Any] = {"epochs": 1, "note": pytest.fail}


def test_the_first_losses_are_those_of_the_first_batch() -> None:
    """Float: the net itself. Calibrated: the model before training. Fake-quant: the first step, whose scales follow."""
    (points,), labels = next(iter(batches(1, 0)))
    torch.manual_seed(3)
    net, model = Tiny(), start(0.5)
    with torch.no_grad():
        wanted = float(F.cross_entropy(net(points), labels)), float(F.cross_entropy(model(points), labels))
    first = trainer(model, **QUIET).run().first_loss
    assert first is not None
    assert (first.in_float, first.calibrated) == pytest.approx(wanted, abs=1e-6)
    assert first.fake_quant != first.calibrated
    frozen = trainer(start(0.0), **QUIET).run().first_loss
    assert frozen is not None
    assert frozen.fake_quant == frozen.calibrated


def test_looking_changes_nothing() -> None:
    one, two = trainer(epochs=1), trainer(epochs=1)
    two.loss = lambda out, target: F.cross_entropy(out, target) if out.requires_grad else torch.tensor(0.0)
    two.params = two.params.model_copy(update={"max_loss_ratio": math.inf})
    assert one.run().history[1] == two.run().history[1]
    assert all(torch.equal(t, state(two.model)[n]) for n, t in state(one.model).items())


@pytest.mark.parametrize(
    ("losses", "abnormal"),
    [((0.5, 0.5, 0.4), False), ((2.0, 2.0, 0.4), False), ((2.2, 2.2, 0.4), True), ((0.09, 0.09, 1e-6), False)],
)
def test_abnormal_is_a_multiple_of_the_float_loss(losses: tuple[float, float, float], abnormal: bool) -> None:
    assert FirstLoss(*losses).abnormal(5.0) is abnormal


def test_the_warning_tells_calibration_from_moving_scales() -> None:
    assert "were the calibrated parameters loaded" in FirstLoss(9.0, 8.0, 0.3).warning(5)
    assert "averaging_constant" in FirstLoss(9.0, 0.4, 0.3).warning(5)


def _twelvefold_in_training(out: Tensor, target: Tensor) -> Tensor:
    """The training forward alone has a graph."""
    return F.cross_entropy(out, target) * (12.0 if out.requires_grad else 1.0)


def test_an_abnormal_start_is_said_at_once_and_training_goes_on() -> None:
    heard = list[str]()
    one = trainer(loss=_twelvefold_in_training, epochs=1, note=heard.append)
    one.on_step = lambda step, total, loss: heard.append(f"step {step}")
    trained = one.run()
    assert heard[0].startswith("QAT029 the first loss is ")
    assert heard[1:] == [f"step {k}" for k in range(1, STEPS + 1)]
    assert trained.first_loss is not None
    assert trained.first_loss.fake_quant == pytest.approx(12 * trained.first_loss.calibrated, rel=0.1)


def test_the_default_note_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="QAT029 the first loss is"):
        trainer(loss=_twelvefold_in_training, epochs=1).run()


def test_a_healthy_start_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(epochs=1).run()


# -- no calibration ----------------------------------------------------------------------------------------------------


def test_a_model_without_scales_is_refused_by_its_state() -> None:
    model = prepare_qat_fx(Tiny(), example_inputs=(clouds(0)[0],))
    with pytest.raises(StateError, match="QAT150"):
        trainer(model).run()


def test_scales_left_at_an_initial_value_are_refused() -> None:
    model = prepare_qat_fx(Tiny(), example_inputs=(clouds(0)[0],))
    for fake in _fakes(model):
        fake.scale.fill_(1.0)
    before = state(model)
    with pytest.raises(TrainingError, match="QAT196 activation scales: all 2 are 1, which is not"):
        trainer(model).run()
    assert all(torch.equal(t, before[n]) for n, t in state(model).items()), "before the first step"


def test_equal_scales_that_the_data_allow_are_not() -> None:
    model = start()
    for fake in _fakes(model):
        fake.scale.fill_(2.0**-6)  # as a power-of-two rule may give
    check_calibrated(model)
    for fake in _fakes(model):
        fake.scale.fill_(3.0)
    with pytest.raises(TrainingError, match="QAT196"):
        check_calibrated(model)


def _fakes(model: Any) -> list[Any]:
    return [op.activation_post_process for _, op in model.ops() if op.activation_post_process is not None]
