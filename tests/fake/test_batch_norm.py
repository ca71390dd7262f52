"""Batch norms kept through QAT, against torch's own in train mode: 16 bits hardly round, so both compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.errors import DataError, TrainingError
from qatlib.fake.batch_norm import KeptBatchNorm, fold_batch_norms, freeze_batch_norms, keep_batch_norms
from qatlib.fake.calibrate import calibrate
from qatlib.fake.exact import ExactForward
from qatlib.fake.float_form import float_form
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.ptq.equalize import equalize
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.fake.state import FakeQuantState
from qatlib.pipeline.config import QatParams
from tests.fake.training import clouds, score, state, trainer
from tests.models import calibrated

WIDE = QConfig(FakeQuantSpec("int16", scale=2**-11), FakeQuantSpec("int16", method="min_max"))


class Branches(nn.Module):
    """Depthwise and dense convolutions, an add, one block called twice; statistics that are not those of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.twice = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, eps=1e-3))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 5)
        self.last = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.mix(self.twice(self.twice(x))) + x)
        out: Tensor = self.last(self.head(self.up(x).mean((2, 3))))
        return out


def branches() -> Branches:
    torch.manual_seed(0)
    net = Branches()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        net.stem[1].weight[2].neg_()
    return net.eval()


def images(items: int, seed: int = 1) -> Tensor:
    return torch.randn(items, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def wide(net: nn.Module, x: Tensor, qconfig: QConfig = WIDE) -> FakeQuantModel:
    model = prepare_qat_fx(net, qconfig, example_inputs=(x,))
    calibrate(model, [x])
    return model


def training(model: FakeQuantModel) -> FakeQuantModel:
    model.train()
    set_fake_quantize(model, FakeQuantState.QAT)
    return model


def evaluating(model: FakeQuantModel) -> FakeQuantModel:
    model.eval()
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    return model


def close(found: Tensor, wanted: Tensor, share: float = 2e-3) -> None:
    apart, whole = (float(x.detach().double().norm()) for x in (found - wanted, wanted))
    assert apart <= share * whole + 1e-3, f"apart by {apart / whole:.2%}"


def test_training_is_that_of_the_float_net_with_its_batch_norms() -> None:
    net, x = branches(), images(16)
    model = wide(net, x)
    assert keep_batch_norms(model) == ("stem.0", "twice.0", "twice.0#1", "mix.0", "up.0", "head")
    found, wanted = training(model)(x), net.train()(x)
    close(found, wanted, 1e-2)  # the last normalizes means that hardly differ
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    for name, norm, layer in (
        ("stem.0", net.stem[1], net.stem[0]),
        ("twice.0", net.twice[1], net.twice[0]),
        ("mix.0", net.mix[1], net.mix[0]),
        ("up.0", net.up[1], net.up[0]),
        ("head", net.last, net.head),
    ):
        op = model.op(name)
        kept = op.kept_batch_norm
        assert kept is not None
        bias = 0.0 if layer.bias is None else layer.bias.detach()
        close(kept.running_mean + bias, norm.running_mean)
        close(kept.running_var, norm.running_var)
        close(kept.weight.grad, norm.weight.grad, 3e-2)
        close(
            op.get_parameter("bias").grad, norm.bias.grad, 0.1
        )  # a sum of signs: values next to the ends of relu6 fall on either side
        weight = op.get_parameter("weight")
        grad = layer.weight.grad.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight.grad
        close(weight.grad, grad, 3e-2)
    assert model.op("twice.0").kept_batch_norm is model.op("twice.0#1").kept_batch_norm


@pytest.mark.parametrize("change", ["nothing", "weights and bias", "a silent channel"])
def test_keeping_and_folding_leave_the_function_as_it_is(change: str) -> None:
    net = branches()
    if change == "a silent channel":
        with torch.no_grad():
            net.stem[1].weight[1] = 0
    model = wide(net, images(16), QConfig())
    if change == "weights and bias":
        with torch.no_grad():
            for _, op in model.ops():
                for tensor in op.float_params().values():
                    tensor.mul_(1.1).add_(0.01)
    before, names = state(model), list(model.state_dict())
    wanted = float_form(model, images(16))
    keep_batch_norms(model)
    assert list(model.state_dict()) != names
    close(float_form(model, images(16)), wanted, 1e-5)
    loss = training(model)(images(16)).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    fold_batch_norms(evaluating(model))
    assert list(model.state_dict()) == names
    moved = model.op("stem.0").get_parameter("weight")
    assert not torch.allclose(moved, before["stem.0.weight"], rtol=1e-4) or change == "a silent channel"


def test_folding_at_once_gives_the_weights_back() -> None:
    model = wide(branches(), images(16), QConfig())
    before = state(model)
    keep_batch_norms(model)
    assert keep_batch_norms(model) == ()
    fold_batch_norms(model)
    after = state(model)
    assert list(after) == list(before)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-6)


def test_the_program_is_that_of_the_folded_model() -> None:
    model = wide(branches(), images(16), QConfig())
    keep_batch_norms(model)
    training(model)(images(16, seed=3))
    kept = convert_fx(evaluating(model))(images(4))
    close(model(images(4)), kept, 0.05)
    fold_batch_norms(model)
    torch.testing.assert_close(convert_fx(model)(images(4)), kept, rtol=0, atol=0)


def test_frozen_statistics_stay_and_train_as_folded() -> None:
    model = wide(branches(), images(16))
    keep_batch_norms(model)
    freeze_batch_norms(model)
    before = state(model)
    found = training(model)(images(16, seed=4))
    torch.testing.assert_close(found, evaluating(model)(images(16, seed=4)))
    found.sum().backward()
    norm = model.op("mix.0").kept_batch_norm
    assert norm is not None
    assert norm.weight.grad is not None
    for name in before:
        if "running" in name:
            torch.testing.assert_close(model.state_dict()[name], before[name], rtol=0, atol=0)
    exact = ExactForward(training(model))(images(4))
    torch.testing.assert_close(exact, convert_fx(evaluating(model))(images(4)), rtol=0, atol=1e-6)
    freeze_batch_norms(model, False)
    training(model)(images(16, seed=4))
    assert not torch.equal(norm.running_mean, before["mix.0.kept_batch_norm.running_mean"])


def test_an_equalized_net_trains_as_the_float_net() -> None:
    net, x = branches(), images(16)
    with torch.no_grad():
        net.stem[1].weight.mul_(torch.logspace(-0.6, 0.6, 8))
        net.stem[1].bias.mul_(torch.logspace(-0.6, 0.6, 8))
    model = prepare_qat_fx(net, WIDE, example_inputs=(x,))
    graph, pairs = equalize(model.graph)
    assert pairs
    plan = {name: op.qconfig for name, op in model.ops()}
    made = {name: op.activation_post_process is not None for name, op in model.ops()}
    equalized = FakeQuantModel(graph, plan, made)
    calibrate(equalized, [x])
    keep_batch_norms(equalized)
    close(training(equalized)(x), net.train()(x), 2e-2)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(self.norm(self.first(x))))
        return out


def normed() -> FakeQuantModel:
    torch.manual_seed(3)
    return calibrated(Normed(), clouds(0)[0])


def watched(**changes: Any) -> tuple[FakeQuantModel, list[Tensor], list[Tensor]]:
    """Scales and running means after every step of a training."""
    model = normed()
    scales, means = [], []

    def look(step: int, total: int, loss: float) -> None:
        norm = model.op("first").kept_batch_norm
        assert norm is not None
        scales.append(norm.weight.detach().clone())
        means.append(norm.running_mean.clone())

    trainer(model, on_step=look, batch_norm="keep", **changes).run()
    return model, scales, means


def test_training_moves_statistics_until_they_are_frozen() -> None:
    model, scales, means = watched(freeze_batch_norm=2)
    assert all(not torch.equal(a, b) for a, b in pairwise(scales))
    moved = [not torch.equal(a, b) for a, b in pairwise(means)]
    assert moved == [True] * 5 + [False] * 12
    assert list(model.state_dict()) == list(normed().state_dict())
    assert model.op("first").kept_batch_norm is None
    assert score(model).integer > 0.6


@pytest.mark.parametrize("freeze", [None, 2])
def test_resuming_equals_an_uninterrupted_run(tmp_path: Path, freeze: int | None) -> None:
    whole, *_ = watched(freeze_batch_norm=freeze)
    for stop in (5, 8, 13):
        scratch, model = tmp_path / str(stop), normed()

        def on_step(step: int, total: int, loss: float, stop: int = stop) -> None:
            if step == stop:
                raise KeyboardInterrupt

        options: dict[str, Any] = {"scratch": scratch, "batch_norm": "keep", "freeze_batch_norm": freeze}
        with pytest.raises(KeyboardInterrupt):
            trainer(model, on_step=on_step, **options).run()
        resumed = normed()
        trainer(resumed, **options).run()
        for name, tensor in state(whole).items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_nan_goes_back_to_the_statistics_of_the_checkpoint() -> None:
    def broken(forward: Callable[..., Tensor] = F.cross_entropy) -> Callable[[Tensor, Tensor], Tensor]:
        calls = iter(range(1000))
        return lambda outputs, targets: forward(outputs, targets) * (float("nan") if next(calls) == 12 else 1.0)

    options: dict[str, Any] = {"loss": broken(), "on_nan": "rewind", "batch_norm": "keep", "note": lambda text: None}
    one = trainer(normed(), **options)
    assert one.run().rewinds == 1
    assert all(torch.isfinite(t).all() for t in state(one.model).values() if t.is_floating_point())


def test_an_optimizer_built_before_lacks_the_scales() -> None:
    model = normed()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="QAT128 optimizer SGD: the scales of 1 of 1 kept batch norms"):
        trainer(model, optimizer=early, batch_norm="keep").run()
    model = normed()
    keep_batch_norms(model)
    trainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), batch_norm="keep").run()


def test_one_item_has_no_statistics() -> None:
    def batches(epoch: int, first: int) -> Any:
        points, labels = clouds(1)
        return (((points[k : k + 1],), labels[k : k + 1]) for k in range(first, 6))

    with pytest.raises(DataError, match="QAT194"):
        trainer(normed(), batches=batches, items=lambda epoch, batch: [batch], batch_norm="keep").run()
    trainer(normed(), batches=batches, items=lambda epoch, batch: [batch], batch_norm="keep", freeze_batch_norm=1).run()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"freeze_batch_norm": 2}, "batch_norm is fold"),
        ({"freeze_batch_norm": 0, "batch_norm": "keep"}, "greater than or equal to 1"),
        ({"forward": "exact", "batch_norm": "keep"}, "set freeze_batch_norm: 1"),
        ({"forward": "exact", "batch_norm": "keep", "freeze_batch_norm": 2}, "set freeze_batch_norm: 1"),
        ({"batch_norm": "kept"}, "'fold' or 'keep'"),
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        QatParams(**wrong)
    QatParams(forward="exact", batch_norm="keep", freeze_batch_norm=1)


def test_a_copy_has_its_own() -> None:
    model = normed()
    keep_batch_norms(model)
    other = copy.deepcopy(model)
    training(other)(clouds(1)[0])
    norms = [m.op("first").kept_batch_norm for m in (model, other)]
    assert all(isinstance(norm, KeptBatchNorm) for norm in norms)
    assert not torch.equal(norms[0].running_mean, norms[1].running_mean)
