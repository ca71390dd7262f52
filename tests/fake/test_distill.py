"""Distillation: the two distances against their definition, and what reaches the gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import ConfigError, DataError
from qatlib.fake.distill import Distillation, kl, mse
from qatlib.pipeline.config import DistillParams
from tests.fake.training import clouds, start, state, trainer
from tests.models import Tiny


def _softmax(scores: list[float], temperature: float) -> list[float]:
    powers = [math.exp(s / temperature) for s in scores]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_by_its_definition(temperature: float) -> None:
    student, teacher = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    total = 0.0
    for n in range(4):
        for k in range(2):
            p, q = (_softmax(x[n, :, k].tolist(), temperature) for x in (teacher, student))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(kl(student, teacher, temperature)) == pytest.approx(temperature**2 * total / 8, rel=1e-5)
    assert float(kl(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-7)


def test_mse_of_nested_outputs() -> None:
    def outputs(seed: int) -> Any:
        g = np.random.default_rng(seed)
        a, b = (torch.tensor(g.normal(size=s), dtype=torch.float32) for s in ((2, 3), (2, 5)))
        return {"boxes": (a, [b]), "best": torch.tensor([seed])}

    one, two = outputs(1), outputs(2)
    wanted = [
        np.square(x.numpy() - y.numpy()).mean()
        for x, y in ((one["boxes"][0], two["boxes"][0]), (one["boxes"][1][0], two["boxes"][1][0]))
    ]
    assert float(mse(one, two, 1.0)) == pytest.approx(np.mean(wanted), rel=1e-5)


@pytest.mark.parametrize("outputs", [torch.randn(3), (torch.randn(2, 3), torch.randn(2, 3))])
def test_kl_needs_scores(outputs: Any) -> None:
    with pytest.raises(DataError, match=r"QAT114 qat.distill: kl needs scores .*Use loss: mse"):
        kl(outputs, outputs, 1.0)


def test_mse_needs_a_real_output() -> None:
    with pytest.raises(DataError, match="QAT114"):
        mse(torch.tensor([1]), torch.tensor([2]), 1.0)


def test_the_objective_is_the_blend() -> None:
    points, labels = clouds(1)
    teacher, net = Tiny(), Tiny()
    with torch.no_grad():
        wanted = 0.7 * F.cross_entropy(net(points), labels) + 0.3 * F.mse_loss(net(points), teacher(points))
        found = Distillation(teacher, 0.3, 1.0, mse).objective(
            net(points), (points,), lambda: F.cross_entropy(net(points), labels)
        )
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_the_teacher_is_in_eval_mode_and_gets_no_gradient() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop = Tiny(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.net(x))

    teacher = Dropped().train()
    points = clouds(1)[0]
    out = teacher.net(points).detach().requires_grad_()
    loss = Distillation(teacher, 1.0, 1.0, mse).objective(out, (points,), lambda: pytest.fail("no labels needed"))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None for p in teacher.parameters())


def own_loss(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    return (outputs - wanted).abs().mean() * temperature


def test_by_params() -> None:
    built = Distillation.of(
        DistillParams(weight=0.25, temperature=2.0, loss="tests.fake.test_distill:own_loss"), Tiny()
    )
    assert (built.weight, built.temperature) == (0.25, 2.0)
    assert float(built.loss(torch.ones(2), torch.zeros(2), 3.0)) == 3.0
    assert Distillation.of(DistillParams(), Tiny()).loss is kl
    with pytest.raises(ConfigError, match=r"QAT103 qat.distill.loss"):
        Distillation.of(DistillParams(loss="tests.fake.test_distill:none"), Tiny())


def test_training_towards_the_float_model_without_labels() -> None:
    """Weight 1: labels may be anything, and the outputs come closer to the teacher's."""
    torch.manual_seed(11)
    teacher = Tiny()  # another net than the one that is trained
    points = clouds(1)[0]
    model = start()

    def apart() -> float:
        with torch.no_grad():
            return float(mse(model.eval()(points), teacher(points), 1.0))

    before = apart()
    one = trainer(
        model,
        distillation=Distillation(teacher, 1.0, 1.0, mse),
        loss=lambda out, target: pytest.fail("no labels needed"),
        score=lambda m: _close(m, teacher),
        note=str,
    )
    one.run()
    assert apart() < 0.5 * before
    assert any(not torch.equal(t, state(start())[n]) for n, t in state(model).items())


def _close(model: nn.Module, teacher: nn.Module) -> Any:
    from qatlib.fake.epochs import Scores

    with torch.no_grad():
        value = -float(mse(model(clouds(1)[0]), teacher(clouds(1)[0]), 1.0))
    return Scores(value, value)
