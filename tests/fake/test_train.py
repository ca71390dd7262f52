"""QAT: losses, resuming, and the choice of the best epoch."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.fake.epochs import Scores
from qatlib.fake.float_form import float_form
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.fake.state import FakeQuantState
from qatlib.fake.train import Trained
from qatlib.pipeline.checkpoint import save_tensors
from tests.fake.training import STEPS, batches, clouds, score, start, state, trainer
from tests.models import Tiny, calibrated, images, model

TOTAL = 3 * STEPS


def losses(**changes: Any) -> list[float]:
    """Mean training loss of every epoch."""
    return [row.train_loss for row in trainer(**changes).run().history[1:]]


PINNED = {
    "sgd": ({}, [0.98413, 0.83316, 0.74575]),
    "adamw": ({"optimizer": "adamw", "lr": 0.02, "schedule": "step"}, [0.96651, 0.81552, 0.77755]),
    "adam": ({"optimizer": "adam", "lr": 0.02, "weight_decay": 0.1}, [0.97465, 0.87331, 0.8302]),
    "rmsprop": ({"optimizer": "rmsprop", "lr": 0.01, "optimizer_kwargs": {"alpha": 0.9}}, [0.96901, 0.85647, 0.81367]),
    "constant, clipped": (
        {"schedule": "constant", "clip_grad_norm": 0.1, "momentum": 0.0},
        [1.01298, 1.00229, 0.99358],
    ),
}


@pytest.mark.parametrize(("changes", "wanted"), PINNED.values(), ids=PINNED.keys())
def test_losses_are_pinned(changes: dict[str, Any], wanted: list[float]) -> None:
    assert losses(**changes) == pytest.approx(wanted, abs=1e-4)


def _round(x: Tensor, unit: Tensor) -> Tensor:
    return x + ((x / unit).round() * unit - x).detach()


def _clipped(x: Tensor, scale: Tensor, last: int = 127) -> Tensor:
    """Codes in [-128, 127] times ``scale``; the gradient passes up to ``last``."""
    codes = (x / scale).round()
    inside = ((codes >= -128) & (codes <= last)).to(x)
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
        return x @ _clipped(weight, per_channel[:, None], last=128).T + _round(bias, scale * per_channel)

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


class Dropped(nn.Module):
    """Kept whole, it drops at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = Tiny(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))


def dropped() -> FakeQuantModel:
    torch.manual_seed(3)
    return calibrated(Dropped(), clouds(0)[0], leaf=["drop"])


def _in_float(model: FakeQuantModel) -> Scores:
    """Dropout has no integers."""
    points, labels = clouds(2)
    right = float((float_form(model, points).argmax(1) == labels).float().mean())
    return Scores(right, right)


def masked() -> FakeQuantModel:
    """Scores that are a linear's, a mask's and another linear's: room for the mask depends on all values so far."""
    torch.manual_seed(3)
    hidden = nn.Parameter(torch.zeros(3).masked_fill(torch.tensor([False, True, False]), -1e4), requires_grad=False)
    net = model(
        lambda s, x: ((s.one(x) * 500 + s.hidden) * 0.002 + s.other(x) * 0.5).softmax(-1),
        one=nn.Linear(2, 3), other=nn.Linear(2, 3), hidden=hidden,
    )  # fmt: skip
    for part in (net.one, net.other):
        nn.init.constant_(part.weight, 0.3)
    spec = FakeQuantSpec(method="min_max", averaging_constant=1.0)
    return calibrated(net, clouds(0)[0] / 8, qconfig_dict=QConfig(spec))


def _wide_then_low(epoch: int, first: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Large addends in the first batch, and low sums in one that comes after checkpoints."""
    factors = {(1, 0): 40.0, (3, 0): -4.0}
    for k, ((x,), labels) in enumerate(batches(epoch, first), start=first):
        yield (x.abs().add(1) * factors[epoch, k] if (epoch, k) in factors else x,), labels % 2 * 2


RESUMED: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": "adamw"},
    "plain sgd": {"momentum": 0.0},
    "state in the groups": {"optimizer": "tests.fake.test_optimizer:Signs", "lr": 0.02},
    "random in training": {"model": dropped, "score": _in_float},
    "one kept epoch": {"keep_epochs": 1, "full_score": lambda model: -score(model).integer},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_equals_an_uninterrupted_run(tmp_path: Path, name: str) -> None:
    make = RESUMED[name].get("model", start)
    changes = {key: value for key, value in RESUMED[name].items() if key != "model"}
    whole = trainer(make(), **changes)
    wanted = whole.run()
    for stop in (1, 4, 5, STEPS, STEPS + 1, 11, 2 * STEPS, TOTAL - 1, TOTAL):
        scratch = tmp_path / f"stop{stop}"
        with pytest.raises(StopError):
            trainer(make(), scratch=scratch, on_step=_stop_at(stop), **changes).run()
        torch.manual_seed(stop)
        resumed = trainer(make(), scratch=scratch, **changes)
        seen: list[int] = []
        resumed.on_step = lambda step, total, loss, seen=seen: seen.append(step)
        assert str(resumed.run()) == str(wanted)
        assert len(seen) <= TOTAL - stop + 4, "at most checkpoint_steps are done again"
        assert _bytes(resumed.model, tmp_path) == _bytes(whole.model, tmp_path)


def _room(model: FakeQuantModel) -> float:
    fake = model.op("hidden").activation_post_process
    assert fake is not None
    return float(fake.room)


def test_resuming_keeps_the_room_for_masks(tmp_path: Path) -> None:
    def widest(model: FakeQuantModel) -> Scores:
        return Scores(*[_room(model)] * 3)

    changes: dict[str, Any] = {"batches": _wide_then_low, "lr": 0.01, "score": widest}
    whole = trainer(masked(), **changes)
    whole.run()
    with pytest.raises(StopError):
        trainer(masked(), scratch=tmp_path, on_step=_stop_at(5), **changes).run()
    resumed = trainer(masked(), scratch=tmp_path, **changes)
    resumed.run()
    assert _bytes(resumed.model, tmp_path) == _bytes(whole.model, tmp_path)
    assert _room(whole.model) > _room(masked()) + 30_000, "the first batch counts until the end"


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


def _chosen(sampled: list[float], full: dict[int, float], keep: int, higher: bool = True) -> tuple[Trained, list[int]]:
    """What comes out if epochs score ``sampled`` on the sample and ``full`` on everything, and the epochs asked for."""
    made: list[dict[str, Tensor]] = []
    asked: list[int] = []

    def by_sample(model: FakeQuantModel) -> Scores:
        made.append(state(model))
        return Scores(0.0, sampled[len(made) - 1])

    def by_all(model: FakeQuantModel) -> float:
        assert model.state is FakeQuantState.VALIDATION
        assert not model.training
        found = next(k for k, w in enumerate(made) if all(torch.equal(t, w[n]) for n, t in state(model).items()))
        asked.append(found)
        return full[found]

    one = trainer(score=by_sample, full_score=by_all, keep_epochs=keep, higher_is_better=higher)
    trained = one.run()
    assert all(torch.equal(t, made[trained.best][n]) for n, t in state(one.model).items())
    return trained, asked


@pytest.mark.parametrize(
    ("sampled", "full", "keep", "higher", "asked", "best"),
    [
        ([0.1, 0.5, 0.7, 0.6], {0: 0.2, 2: 0.5, 3: 0.6}, 2, True, [0, 2, 3], 3),
        ([0.1, 0.5, 0.7, 0.6], {0: 0.2, 2: 0.5}, 1, True, [0, 2], 2),
        ([0.9, 0.5, 0.7, 0.6], {0: 0.2, 1: 0.3, 2: 0.1, 3: 0.1}, 9, True, [0, 1, 2, 3], 1),
        ([0.1, 0.5, 0.5, 0.5], {0: 0.2, 1: 0.2, 2: 0.2}, 2, True, [0, 1, 2], 0),
        ([0.9, 0.5, 0.7, 0.6], {0: 0.2, 1: 0.3, 3: 0.1}, 2, False, [0, 1, 3], 3),
        ([0.1, math.nan, 0.2, 0.0], {0: 0.2, 2: math.nan}, 1, True, [0, 2], 0),
    ],
)
def test_all_validation_data_decide_among_the_kept_epochs(
    sampled: list[float], full: dict[int, float], keep: int, higher: bool, asked: list[int], best: int
) -> None:
    trained, seen = _chosen(sampled, full, keep, higher)
    assert (seen, trained.best, trained.integer) == (asked, best, full[best])
    assert [row.integer for row in trained.history] == pytest.approx(sampled, nan_ok=True)


def test_the_history_has_the_weights_in_float_too() -> None:
    """Epoch 0 in float is the float model."""
    one = trainer()
    history = one.run().history
    torch.manual_seed(3)
    points, labels = clouds(2)
    with torch.no_grad():
        wanted = float((Tiny()(points).argmax(1) == labels).float().mean())
    assert history[0].in_float == wanted
    assert history[-1].in_float > wanted


def test_no_epochs_keep_the_calibrated_model() -> None:
    one = trainer(epochs=0, optimizer="no.such:optimizer", batches=lambda *_: pytest.fail("no data is read"))
    before = state(one.model)
    trained = one.run()
    assert (trained.best, trained.rewinds, trained.first_loss) == (0, 0, None)
    assert len(trained.history) == 1
    assert trained.integer == trained.history[0].integer
    assert math.isnan(trained.history[0].train_loss)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(one.model).items())
    assert not one.model.trained


class Conv(nn.Module):
    """``[N, 3, 16, 16]`` to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def _convolutions(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[list[tuple[bool, Tensor, Tensor]], Any]:
    """(in training, weight, output) of each convolution that a training ran, and the trainer after it."""
    seen: list[tuple[bool, Tensor, Tensor]] = []
    convolve = F.conv2d

    def spy(x: Tensor, weight: Tensor, *more: Any, **named: Any) -> Tensor:
        out = convolve(x, weight, *more, **named)
        seen.append((torch.is_grad_enabled(), weight, out))
        return out

    torch.manual_seed(0)
    x, labels = images(32), torch.arange(32) % 3
    model = calibrated(Conv(), x, qconfig_dict=QConfig(FakeQuantSpec(averaging_constant=0.0)))
    rising = iter([Scores(0, 0, 0), Scores(1, 1, 1)])
    options = {"batches": lambda epoch, first: [((x,), labels)] * (STEPS - first), "score": lambda _: next(rising)}
    one = trainer(model, epochs=1, **options, **changes)
    monkeypatch.setattr(F, "conv2d", spy)
    one.run()
    monkeypatch.undo()
    return seen, one


def test_bf16_is_the_arithmetic_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, mixed = _convolutions(monkeypatch, amp="bf16")
    assert {(training, out.dtype) for training, _, out in seen} == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    _, plain = _convolutions(monkeypatch)
    pairs = list(zip(mixed.model.parameters(), plain.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_channels_last_leaves_what_has_five_axes_as_it_is() -> None:
    x, labels = images(16, size=6), torch.arange(16) % 3
    net = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 4, (1, 3, 3)), nn.Flatten(), nn.Linear(64, 3)).eval()
    fit = trainer(
        calibrated(net, x),
        channels_last=True,
        epochs=1,
        batches=lambda epoch, first: (((x,), labels) for _ in range(first, STEPS)),
        score=lambda model: Scores(0.0, 0.0, 0.0),
    )
    assert len(fit.run().history) == 2


def test_channels_last_is_the_layout_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, last = _convolutions(monkeypatch, channels_last=True)
    trained = [(weight, out) for training, weight, out in seen if training]
    assert trained
    assert all(t.is_contiguous(memory_format=torch.channels_last) for pair in trained for t in pair)
    assert all(p.is_contiguous() for p in last.model.parameters())
    _, plain = _convolutions(monkeypatch)
    for a, b in zip(last.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
