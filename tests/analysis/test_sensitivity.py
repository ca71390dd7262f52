"""Sensitivity: replay against full runs to the bit, distances against NumPy, planted faults by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.analysis.distance import Meter
from qatlib.analysis.replay import FLOAT, Form, FormedModel, Replay
from qatlib.analysis.sensitivity import sensitivity
from qatlib.analysis.steps import step_quantization
from qatlib.analysis.taylor import rank_correlation
from qatlib.errors import ConfigError, DataError, QConfigError, StateError
from qatlib.fake.float_form import float_form
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.qconfig import default_calib_8bit_weight_16bit_act_fake_quant_qconfig as INT16
from qatlib.fake.state import FakeQuantState
from qatlib.pipeline.metrics import Accuracy
from tests.analysis.analysis_nets import Trio
from tests.models import calibrated, everything, images, model


@pytest.fixture(scope="module")
def net() -> FakeQuantModel:
    return calibrated(everything(), images(8))


WIDE = 50


def wide_channel() -> nn.Module:
    """Pairs of a depthwise and a 1×1 convolution; one channel of the second depthwise is far wider."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {"stem": nn.Conv2d(3, 8, 3, padding=1), "head": nn.Linear(8, 5)}
    for i in range(4):
        parts[f"each{i}"] = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        parts[f"point{i}"] = nn.Conv2d(8, 8, 1)
    with torch.no_grad():
        for part in parts.values():
            part.bias.zero_()
        parts["each1"].weight[3].mul_(WIDE)
        parts["point1"].weight[:, 3].div_(WIDE)

    def body(m: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        for i in range(4):
            x = F.relu(getattr(m, f"point{i}")(F.relu(getattr(m, f"each{i}")(x))))
        return m.head(x.mean((2, 3)))

    return model(body, **parts)


def noise_of(reference: Tensor, other: Tensor) -> float:
    a, b = reference.double().numpy(), other.double().numpy()
    return float(np.square(b - a).sum() / np.square(a).sum())


# -- replay ------------------------------------------------------------------------------------------------------------


def test_everything_on_is_the_calibrated_model_and_nothing_on_the_float_one(net: FakeQuantModel) -> None:
    formed, x = FormedModel(net), images(8, seed=3)
    assert torch.equal(Replay(formed.model, [x], formed.computing(formed.full)).outputs[0], net(x))
    assert torch.equal(Replay(formed.model, [x], formed.computing({})).outputs[0], float_form(net, x))
    assert torch.equal(Replay(formed.model, [x], formed.computing(formed.full)).outputs[0], net(x)), "set back"


@pytest.mark.parametrize("rounded", [True, False])
def test_a_replayed_variant_is_a_full_run_to_the_bit(net: FakeQuantModel, rounded: bool) -> None:
    formed, x = FormedModel(net), images(8, seed=3)
    base = formed.full if rounded else {}
    replay = Replay(formed.model, [x], formed.computing(base))
    for name, full in formed.full.items():
        for form in (FLOAT, full, Form(full.weight, None), Form(None, full.activation), formed.widened(name)):
            forms = base | {name: form}
            (seen,) = replay.variant([name], formed.computing(forms))
            (whole,) = Replay(formed.model, [x], formed.computing(forms)).outputs
            assert torch.equal(seen, whole), (name, form)


def test_a_variant_of_nothing_computes_nothing(net: FakeQuantModel) -> None:
    formed, x = FormedModel(net), images(4)
    replay = Replay(formed.model, [x], formed.computing(formed.full))
    before = replay.computed
    assert torch.equal(replay.variant([], formed.computing({}))[0], net(x))
    assert replay.computed == before


def test_the_model_given_is_left_alone(net: FakeQuantModel) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    out = net(images())
    sensitivity(net, images(8))
    assert torch.equal(net(images()), out)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["block.conv", "cat", "pool", "x"])
def test_16_bits_are_those_of_the_override(name: str) -> None:
    data = images(8)
    other = calibrated(everything(), data, qconfig_dict={"module_name": {name: INT16}})
    trial = sensitivity(calibrated(everything(), data), data, kinds=["int16"]).find(name, "int16", "activation")
    assert trial is not None
    assert trial.distance.noise == pytest.approx(noise_of(float_form(other, data), other(data).detach()), rel=1e-9)


# -- measured ----------------------------------------------------------------------------------------------------------


def test_distances_and_shares_are_numpys(net: FakeQuantModel) -> None:
    batches = [images(8, seed=3), images(4, seed=4)]
    seen = sensitivity(net, batches)
    exact = torch.cat([float_form(net, x) for x in batches])
    rounded = torch.cat([net(x).detach() for x in batches])
    assert seen.samples == 12
    assert seen.whole.noise == pytest.approx(noise_of(exact, rounded))
    assert seen.whole.mse == pytest.approx(float(np.square((rounded - exact).double().numpy()).mean()))
    formed = FormedModel(net)
    forms = {"hidden": formed.full["hidden"]}
    alone = torch.cat([Replay(formed.model, [x], formed.computing(forms)).outputs[0] for x in batches])
    on, off = seen.find("hidden", "on"), seen.find("hidden", "off")
    assert on is not None
    assert off is not None
    assert on.distance.noise == pytest.approx(noise_of(exact, alone))
    assert on.share == pytest.approx(on.distance.noise / seen.whole.noise)
    assert off.share == pytest.approx(1 - off.distance.noise / seen.whole.noise)


def test_groups_of_everything_are_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    stack = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    fake = calibrated(model(lambda m, x: m.stack(x), stack=stack), x)
    seen = sensitivity(fake, x, groups=["x", "stack"])
    alone = seen.find("x", "on")
    assert alone is not None
    without = seen.find("stack", "off")
    assert without is not None
    assert without.distance == alone.distance, "all but the stack is its input"


def test_multiple_outputs_count_alike() -> None:
    meter = Meter()
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[100.0]])
    meter.add([a, b, torch.tensor([1])], [a + 0.1, b, torch.tensor([2])])
    assert meter.result().noise == pytest.approx(0.01 / 2, rel=1e-5)


def test_a_metric_is_had_of_every_trial(trio: Trio) -> None:
    x = torch.cat(trio.batches)
    labels = trio.float_model.eval()(x).argmax(1)
    seen = sensitivity(trio.fake, [(x, labels)], metric=Accuracy, kinds=["off"])
    assert seen.float_metric == 1.0
    assert seen.whole.metric == pytest.approx(float((trio.fake(x).argmax(1) == labels).float().mean()))
    assert all(trial.distance.metric is not None for trial in seen.trials)


def test_the_plan_is_as_asked(net: FakeQuantModel) -> None:
    everything_on = sensitivity(net, images(8), kinds=["on"], parts=False)
    assert {(t.kind, t.part) for t in everything_on.trials} == {("on", "all")}
    assert len(everything_on.trials) == len(everything_on.units()) == len(everything_on.scores)
    few = sensitivity(net, images(8), kinds=["on"], parts=False, top=3)
    best = sorted(everything_on.scores, key=lambda name: -everything_on.scores[name])[:3]
    assert {u.name for u in few.units()} == set(best)
    assert few.scores == everything_on.scores
    assert few.forwards < everything_on.forwards


# -- planted -----------------------------------------------------------------------------------------------------------


def test_a_range_blown_up_in_one_depthwise_convolution_is_ranked_first() -> None:
    net, data = wide_channel(), images(16, size=8)
    seen = sensitivity(calibrated(net, data), data)
    assert seen.ranked("off")[0].unit.name == "each1"
    assert seen.ranked("on")[0].unit.name == "each1"
    assert max(seen.scores, key=lambda name: seen.scores[name]) == "each1"
    assert seen.ranked("off", "activation")[0].unit.name == "each1"
    wide = seen.find("each1", "int16", "activation")
    assert wide is not None
    assert wide.share > 0.75


# -- ranked beforehand -------------------------------------------------------------------------------------------------


def test_gradient_scores_foretell_the_measured_ranks() -> None:
    data = images(16, size=8)
    seen = sensitivity(calibrated(wide_channel(), data), data, kinds=["on"], parts=False)
    assert seen.correlation is not None
    assert seen.correlation > 0.7


def test_a_linear_network_is_foretold_exactly() -> None:
    """Where the outputs are linear in what an op makes, the expected score is the measured noise."""
    torch.manual_seed(0)
    x = torch.randn(4096, 1)
    fake = calibrated(model(lambda m, x: m.b(m.a(x)), a=nn.Linear(1, 6), b=nn.Linear(6, 1)), x)
    found = [sensitivity(fake, x[i : i + 16], kinds=["on"], parts=False) for i in range(0, 1024, 16)]
    measured = sum(t.distance.noise for s in found for t in s.trials if t.unit.name == "a")
    assert sum(s.scores["a"] for s in found) == pytest.approx(measured, rel=0.02)


def test_values_of_one_number_per_sample_are_foretold_as_rows_of_one() -> None:
    torch.manual_seed(0)
    x, parts = torch.randn(16, 4), {"a": nn.Linear(4, 6), "b": nn.Linear(6, 1)}
    rows = sensitivity(calibrated(model(lambda m, x: -m.b(m.a(x)), **parts), x), x)
    flat = sensitivity(calibrated(model(lambda m, x: -m.b(m.a(x)).flatten(), **parts), x), x)
    assert flat.scores == pytest.approx(rows.scores)
    assert all(flat.scores.values())


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3], [10, 20, 90], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1, 1], [1, 2, 3], 0.0)],
)
def test_rank_correlation(first: list[float], second: list[float], expected: float) -> None:
    assert rank_correlation(first, second) == pytest.approx(expected)


def test_rank_correlation_of_ties() -> None:
    """Equal values share the mean of their ranks: 1.5, 1.5, 3, 4."""
    a, b = np.array([1.5, 1.5, 3, 4]), np.array([2.0, 1, 3, 4])
    assert rank_correlation([5, 5, 7, 9], [2, 1, 3, 4]) == pytest.approx(float(np.corrcoef(a, b)[0, 1]))


# -- steps -------------------------------------------------------------------------------------------------------------


def test_steps_start_float_and_end_with_the_whole(net: FakeQuantModel) -> None:
    data = [images(8, seed=3), images(4, seed=4)]
    seen, all_of = step_quantization(net, data), sensitivity(net, data)
    assert seen.start.noise == 0.0
    assert seen.steps[-1].first == all_of.whole
    assert seen.steps[0].first == seen.steps[0].alone
    assert [s.alone for s in seen.steps] == [t.distance for t in all_of.trials if (t.kind, t.part) == ("on", "all")]
    formed = FormedModel(net)
    forms = {name: formed.full[name] for step in seen.steps[:4] for name in step.unit.ops}
    third = torch.cat([Replay(formed.model, [x], formed.computing(forms)).outputs[0] for x in data])
    exact = torch.cat([float_form(net, x) for x in data])
    assert seen.steps[3].first.noise == pytest.approx(noise_of(exact, third))


def test_the_steepest_step_is_the_planted_one() -> None:
    data = images(16, size=8)
    steepest = step_quantization(calibrated(wide_channel(), data), data).steepest()
    assert steepest is not None
    assert steepest.unit.name == "each1"


def test_groups_are_steps(net: FakeQuantModel) -> None:
    seen = step_quantization(net, images(8), groups=["hidden", "block"])
    assert [(s.unit.name, s.unit.ops) for s in seen.steps] == [("block", ("block.conv",)), ("hidden", ("hidden",))]


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        ({"kinds": ["of"]}, ConfigError, "QAT217"),
        ({"top": 0}, ConfigError, "QAT217"),
        ({"groups": ["nothing"]}, QConfigError, "QAT144"),
        ({"groups": ["block", "block.conv"]}, QConfigError, "QAT216"),
        ({"metric": Accuracy}, DataError, "QAT215"),
    ],
)
def test_wrong_arguments(net: FakeQuantModel, options: dict[str, Any], kind: type[Exception], code: str) -> None:
    with pytest.raises(kind, match=code):
        sensitivity(net, images(), **options)


def test_wrong_models_and_data(net: FakeQuantModel) -> None:
    with pytest.raises(StateError, match="QAT155"):
        sensitivity(nn.Linear(2, 2), torch.zeros(1, 2))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="QAT118"):
        sensitivity(net, [])
    ranks = calibrated(model(lambda m, x: m.a(x).argmax(1), a=nn.Linear(4, 3)), torch.randn(8, 4))
    with pytest.raises(DataError, match="QAT214"):
        sensitivity(ranks, torch.randn(8, 4))
    set_fake_quantize(ranks, FakeQuantState.CALIBRATION)
    with pytest.raises(StateError, match="QAT156"):
        sensitivity(ranks, torch.randn(8, 4))
