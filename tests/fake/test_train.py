"""QAT: losses, resuming, the choice of the best epoch, schedules, and what is said when a value is not finite."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qatlib.errors import TrainingError
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.state import FakeQuantState
from qatlib.fake.train import Scores
from qatlib.pipeline.checkpoint import save_tensors
from tests.fake.training import STEPS, batches, start, state, trainer

TOTAL = 3 * STEPS


def losses(**changes: Any) -> list[float]:
    """Mean training loss of every epoch."""
    return [row.train_loss for row in trainer(**changes).run().history[1:]]


PINNED = {
    "sgd": ({}, [0.98541, 0.8449, 0.76647]),
    "adamw": ({"optimizer": "adamw", "lr": 0.02, "schedule": "step"}, [0.96936, 0.82322, 0.78493]),
    "constant, clipped": (
        {"schedule": "constant", "clip_grad_norm": 0.1, "momentum": 0.0},
        [1.01299, 1.00274, 0.99398],
    ),
}


@pytest.mark.parametrize(("changes", "wanted"), PINNED.values(), ids=PINNED.keys())
def test_losses_are_pinned(changes: dict[str, Any], wanted: list[float]) -> None:
    assert losses(**changes) == pytest.approx(wanted, abs=1e-4)


def _round(x: Tensor, unit: Tensor) -> Tensor:
    return x + ((x / unit).round() * unit - x).detach()


def _clipped(x: Tensor, scale: Tensor) -> Tensor:
    """Codes in [-128, 127] times ``scale``; the gradient passes inside."""
    codes = (x / scale).round()
    inside = ((codes >= -128) & (codes <= 127)).to(x)
    return (codes.clamp(-128, 127) * scale - x * inside).detach() + x * inside


def test_losses_equal_those_of_a_loop_written_by_hand() -> None:
    """SGD with momentum and decay, cosine after two warm-up steps, scales that follow by c = 0.1."""
    model = start()
    parameters = dict(model.named_parameters())
    names = ["hidden.weight", "hidden.bias", "head.weight", "head.bias"]
    w1, b1, w2, b2 = tensors = [parameters[name].detach().clone().requires_grad_() for name in names]
    scales = {name: torch.tensor(model.qtype(name).scale) for name in ("x.quant", "hidden")}
    velocity = [torch.zeros_like(t) for t in tensors]

    def quantize(x: Tensor, name: str) -> Tensor:
        scales[name] = 0.9 * scales[name] + 0.1 * x.detach().abs().max() / 127.5
        return _clipped(x, scales[name])

    def dense(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        per_channel = weight.detach().abs().amax(1) / 127.5
        return x @ _clipped(weight, per_channel[:, None]).T + _round(bias, scale * per_channel)

    step, means = 0, []
    for epoch in (1, 2, 3):
        total = 0.0
        for (points,), labels in batches(epoch, 0):
            x = quantize(points, "x.quant")
            hidden = quantize(dense(x, scales["x.quant"], w1, b1).relu(), "hidden")
            loss = F.cross_entropy(dense(hidden, scales["hidden"], w2, b2), labels)
            grads = torch.autograd.grad(loss, tensors)
            done = (step - 2) / (TOTAL - 2)
            lr = 0.05 * ((step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * done)))
            with torch.no_grad():
                for tensor, grad, v in zip(tensors, grads, velocity, strict=True):
                    v.mul_(0.9).add_(grad + (1e-3 * tensor if tensor.dim() > 1 else 0))
                    tensor -= lr * v
            total, step = total + float(loss.detach()), step + 1
        means.append(total / STEPS)
    assert losses() == pytest.approx(means, abs=1e-4)


def test_training_helps_and_is_repeatable() -> None:
    one, two = trainer(), trainer()
    trained, again = one.run(), two.run()
    assert str(trained) == str(again), "as text: the loss of epoch 0 is NaN"
    assert trained.history[-1].train_loss < trained.history[1].train_loss
    assert trained.history[trained.best].integer == max(row.integer for row in trained.history)
    assert trained.best > 0
    assert one.model.state is FakeQuantState.VALIDATION
    assert not one.model.training
    assert one.model.trained
    assert all(torch.equal(a, b) for a, b in zip(state(one.model).values(), state(two.model).values(), strict=True))


# -- resume ------------------------------------------------------------------------------------------------------------


class StopError(Exception):
    """The process dies here."""


def _stop_at(step: int) -> Callable[[int, int, float], None]:
    def on_step(now: int, total: int, loss: float) -> None:
        assert total == TOTAL
        if now == step:
            raise StopError

    return on_step


def _bytes(model: FakeQuantModel, folder: Path) -> bytes:
    save_tensors(folder / "final.safetensors", state(model))
    return (folder / "final.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw"}, {"momentum": 0.0}], ids=["sgd", "adamw", "plain sgd"])
def test_resuming_equals_an_uninterrupted_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = trainer(**changes)
    wanted = whole.run()
    for stop in (1, 4, 5, STEPS, STEPS + 1, 11, 2 * STEPS, TOTAL - 1, TOTAL):
        scratch = tmp_path / f"stop{stop}"
        with pytest.raises(StopError):
            trainer(scratch=scratch, on_step=_stop_at(stop), **changes).run()
        resumed = trainer(scratch=scratch, **changes)
        seen: list[int] = []
        resumed.on_step = lambda step, total, loss, seen=seen: seen.append(step)
        assert str(resumed.run()) == str(wanted)
        assert len(seen) <= TOTAL - stop + 4, "at most checkpoint_steps are done again"
        assert _bytes(resumed.model, tmp_path) == _bytes(whole.model, tmp_path)


def test_resuming_twice_and_after_the_end(tmp_path: Path) -> None:
    whole = trainer()
    whole.run()
    for stop in (5, 9, 14):
        with pytest.raises(StopError):
            trainer(scratch=tmp_path, on_step=_stop_at(stop)).run()
    for _ in range(2):
        resumed = trainer(scratch=tmp_path)
        resumed.run()
        assert _bytes(resumed.model, tmp_path) == _bytes(whole.model, tmp_path)
        assert resumed.model.state is FakeQuantState.VALIDATION


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5, 13])
def test_resuming_after_kill_9(tmp_path: Path, stop: int) -> None:
    def run(scratch: str, out: str, *more: str) -> int:
        command = [sys.executable, "-m", "tests.fake.training", str(tmp_path / scratch), str(tmp_path / out), *more]
        return subprocess.run(command, cwd=Path(__file__).parents[2], check=False, timeout=120).returncode

    assert run("whole", "whole.safetensors") == 0
    assert run("cut", "cut.safetensors", str(stop)) == -signal.SIGKILL
    assert not (tmp_path / "cut.safetensors").exists()
    assert run("cut", "cut.safetensors") == 0
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


# -- the best epoch ----------------------------------------------------------------------------------------------------


def _scored(values: list[float], **changes: Any) -> tuple[int, FakeQuantModel, list[dict[str, Tensor]]]:
    """Best epoch if the integers score ``values``, and the weights after every epoch."""
    kept: list[dict[str, Tensor]] = []

    def fake(model: FakeQuantModel) -> Scores:
        assert model.state is FakeQuantState.VALIDATION
        assert not model.training
        kept.append(state(model))
        return Scores(-values[len(kept) - 1], values[len(kept) - 1])

    one = trainer(score=fake, **changes)
    return one.run().best, one.model, kept


@pytest.mark.parametrize(
    ("values", "higher", "best"),
    [
        ([0.1, 0.3, 0.9, 0.4], True, 2),
        ([0.1, 0.3, 0.9, 0.05], False, 3),
        ([0.9, 0.3, 0.2, 0.1], True, 0),
        ([0.1, 0.5, 0.5, 0.5], True, 1),
        ([0.1, math.nan, 0.2, 0.0], True, 2),
    ],
)
def test_the_epoch_whose_integers_score_best(values: list[float], higher: bool, best: int) -> None:
    found, model, kept = _scored(values, higher_is_better=higher)
    assert found == best
    assert all(torch.equal(kept[best][name], tensor) for name, tensor in state(model).items())
    assert model.trained == (best > 0)


def test_no_epochs_keep_the_calibrated_model() -> None:
    one = trainer(epochs=0)
    before = state(one.model)
    trained = one.run()
    assert trained.best == 0
    assert len(trained.history) == 1
    assert math.isnan(trained.history[0].train_loss)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(one.model).items())
    assert not one.model.trained


# -- learning rate, clipping -------------------------------------------------------------------------------------------


def _rates(**changes: Any) -> list[float]:
    one = trainer(lr=0.8, **changes)
    return [one.learning_rate(step) for step in range(TOTAL)]


def test_schedules_in_closed_form() -> None:
    assert _rates(schedule="constant", warmup_steps=0) == [0.8] * TOTAL
    assert _rates(schedule="cosine", warmup_steps=0) == pytest.approx(
        [0.4 * (1 + math.cos(math.pi * k / TOTAL)) for k in range(TOTAL)]
    )
    warm = _rates(schedule="cosine", warmup_steps=3)
    assert warm[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert warm[3:] == pytest.approx([0.4 * (1 + math.cos(math.pi * k / (TOTAL - 3))) for k in range(TOTAL - 3)])
    steps = _rates(schedule="step", warmup_steps=0, milestones=(0.5, 0.75), gamma=0.1)
    assert steps == pytest.approx([0.8] * 9 + [0.08] * 5 + [0.008] * 4)


def test_the_schedule_reaches_the_optimizer() -> None:
    one = trainer(schedule="step", milestones=(0.5,), gamma=0.5, warmup_steps=1, epochs=2)
    history = one.run().history
    assert [row.lr for row in history] == pytest.approx([0.0, 0.05, 0.025])


@pytest.mark.parametrize(("limit", "moved"), [(1e-3, 1e-3), (None, None)])
def test_clipping_bounds_a_step(limit: float | None, moved: float | None) -> None:
    changes = {"momentum": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "schedule": "constant", "lr": 1.0, "epochs": 1}
    model = start()
    before = [p.detach().clone() for p in model.parameters()]
    one = trainer(model, clip_grad_norm=limit, batches=lambda e, k: list(batches(e, k))[:1], **changes)
    one.score = lambda _: Scores(0.0, float(one.model.trained))
    one.run()
    length = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), before, strict=True))
    )
    assert length == pytest.approx(moved, rel=1e-3) if moved else length > 0.05


def test_weight_decay_leaves_biases_alone() -> None:
    optimizer = trainer(weight_decay=0.5)._optimizer()
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(8, 2): 0.5, (3, 8): 0.5, (8,): 0.0, (3,): 0.0}


# -- values that are not finite ----------------------------------------------------------------------------------------


def refused(**changes: Any) -> TrainingError:
    with pytest.raises(TrainingError, match="QAT162") as caught:
        trainer(**changes).run()
    return caught.value


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_a_weight_that_is_nan_names_step_and_module(constant: float) -> None:
    model = start(constant)

    def spoil(step: int, total: int, loss: float) -> None:
        if step == STEPS + 2:
            with torch.no_grad():
                model.op("hidden").weight[0, 0] = math.nan

    error = refused(model=model, on_step=spoil)
    assert error.where.startswith(f"epoch 2 step {STEPS + 2} batch 2 (lr ")
    assert "hidden" in str(error)
    assert "x.quant" not in str(error)
    assert "clip_grad_norm" in error.fix


def test_a_nan_in_the_data_names_the_input() -> None:
    def spoiled(epoch: int, first: int) -> Any:
        for (points,), labels in batches(epoch, first):
            yield (points.masked_fill(torch.eye(16, 2, dtype=torch.bool), math.nan),), labels

    assert "x.quant" in str(refused(batches=spoiled))


def test_a_nan_from_the_loss_alone_says_so() -> None:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target) * math.nan

    error = refused(loss=loss)
    assert error.where.startswith("epoch 1 step 0 batch 0")
    assert "all activations are finite" in error.seen


def test_an_infinite_gradient() -> None:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target) + (out * 0).sum().abs().sqrt()

    assert "gradient norm" in refused(loss=loss).seen
