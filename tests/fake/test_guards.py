"""Values that are not finite: what is said about them, and going back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import DataError, TrainingError
from qatlib.fake.epochs import Scores
from qatlib.fake.guards import check_weights, cures, forward_fault, gradient_fault
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.fake.train import Trainer
from tests.fake.training import STEPS, batches, clouds, items, start, state, trainer
from tests.models import calibrated, model


def refused(**changes: Any) -> TrainingError:
    with pytest.raises(TrainingError, match="QAT162") as caught:
        trainer(items=items, **changes).run()
    return caught.value


def spoil_weight(at: int, net: FakeQuantModel, times: int = 1) -> Callable[[int, int, float], None]:
    """Write a NaN in a weight after step ``at``, the first ``times`` times it is reached."""
    left = [times]

    def on_step(step: int, total: int, loss: float) -> None:
        if step == at and left[0]:
            left[0] -= 1
            with torch.no_grad():
                net.op("hidden").weight[0, 0] = math.nan

    return on_step


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_a_weight_that_is_nan(constant: float) -> None:
    net = start(constant)
    error = refused(model=net, on_step=spoil_weight(STEPS + 2, net))
    numbers = ", ".join(map(str, items(2, 2)))
    lr = 0.05 * 0.5 * (1 + math.cos(math.pi * 6 / 16))
    assert error.where == f"epoch 2 step {STEPS + 2} batch 2 (lr {lr:.3g}, items {numbers})"
    assert "its weight holds 1 of 16 values that are not finite (1 NaN)" in error.seen
    assert "hidden" in error.seen
    assert "x.quant" not in error.seen


def test_an_output_names_the_items_that_make_it_so() -> None:
    """sqrt of what is negative for two rows only."""

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(x.amin(1, keepdim=True) + 3)

    net = calibrated(
        model(lambda m, x: m.head(m.root(x)), root=Root(), head=nn.Linear(1, 3)), clouds(0)[0], leaf=["root"]
    )
    points = clouds(1)[0][:16].clamp(-2, 2)
    points[[3, 11], 1] = -3.5
    fault = forward_fault(net, [points])
    assert fault.rows == (3, 11)
    assert "root" in fault.what
    assert "output holds 2 of 16 values that are not finite (2 NaN)" in fault.what


def test_a_nan_in_the_data_names_the_item() -> None:
    def spoiled(epoch: int, first: int) -> Any:
        for (points,), labels in batches(epoch, first):
            yield (points.index_fill(0, torch.tensor([5]), math.nan),), labels

    with pytest.raises(DataError, match=rf"QAT112 train data batch 0 item {items(1, 0)[5]} input 0"):
        trainer(batches=spoiled, items=items).run()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_targets_are_looked_at_before_the_step(value: float) -> None:
    before = start()

    def spoiled(epoch: int, first: int) -> Any:
        for (points,), labels in batches(epoch, first):
            wanted = {"class": F.one_hot(labels, 3).float(), "label": labels}
            wanted["class"][[2, 7], 1] = value
            yield (points,), wanted

    def loss(out: Tensor, target: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(out, target["class"].nan_to_num(0, 0, 0))

    chosen = f"items {items(1, 0)[2]}, {items(1, 0)[7]}"
    with pytest.raises(DataError, match="QAT112 epoch 1 step 0 batch 0") as caught:
        trainer(before, batches=spoiled, items=items, loss=loss).run()
    assert chosen in caught.value.where
    assert "2 of 48 values" in caught.value.seen
    assert all(torch.equal(t, state(start())[n]) for n, t in state(before).items() if "code" not in n)


def test_a_nan_from_the_loss_alone_says_so() -> None:
    error = refused(loss=lambda out, target: F.cross_entropy(out, target) * math.nan)
    assert error.where.startswith("epoch 1 step 0 batch 0")
    assert "all activations are finite" in error.seen


def test_a_gradient_is_named_with_its_parameter() -> None:
    """The slope of sqrt at 0 is infinite; times 0 it is NaN."""

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target) + (out * 0).sum().abs().sqrt()

    seen = refused(loss=loss).seen
    assert "gradient norm is nan" in seen
    assert "from the outputs back, in the gradient of head." in seen


def test_the_first_gradient_from_the_outputs_back() -> None:
    net = start()
    out = net.train()(clouds(0)[0])
    out.sum().backward()
    assert "every gradient is finite" in gradient_fault(net).what
    net.op("hidden").bias.grad[3] = math.inf
    assert "in the gradient of hidden.bias: 1 of 8 values" in gradient_fault(net).what


def test_weights_are_looked_at_before_they_are_kept(tmp_path: Path) -> None:
    net = start()
    check_weights(net, "here")
    error = refused(model=net, on_step=spoil_weight(4, net), scratch=tmp_path)  # a checkpoint is due after step 4
    assert error.where == "epoch 1 step 3"
    assert "hidden.weight holds 1 of 16" in error.seen
    assert not (tmp_path / "resume.safetensors").exists()


def test_the_cures_stand_in_the_guide_s_order_each_with_its_command() -> None:
    text = cures(0.01)
    places = [text.index(word) for word in ("float model", "data or labels", "qat.lr=0.001", "warmup", "clip_grad")]
    assert places == sorted(places)
    assert text.count("dvc ") == 5


def test_looking_for_the_fault_moves_no_scale() -> None:
    net = start(0.5).train()
    set_fake_quantize(net, FakeQuantState.QAT)
    before = state(net)
    forward_fault(net, [clouds(1)[0] * 100])
    assert all(torch.equal(t, before[n]) for n, t in state(net).items() if n != "state_code")
    assert net.state is FakeQuantState.VALIDATION


# -- going back --------------------------------------------------------------------------------------------------------


def test_rewind_goes_back_and_halves_the_rate(tmp_path: Path) -> None:
    net, said, seen = start(), list[str](), list[int]()
    spoil = spoil_weight(10, net)

    def on_step(step: int, total: int, loss: float) -> None:
        seen.append(step)
        spoil(step, total, loss)

    one = trainer(net, on_nan="rewind", schedule="constant", on_step=on_step, items=items, scratch=tmp_path)
    one.note = said.append
    trained = one.run()
    assert seen == [*range(1, 11), *range(9, 19)], "back to the checkpoint after step 8"
    assert [row.lr for row in trained.history] == [0.0, 0.05, 0.025, 0.025]
    assert trained.rewinds == 1
    (text,) = said
    assert text.startswith("QAT162 epoch 2 step 10 batch 4 (lr 0.05, items ")
    assert "Back to step 8 with the learning rate times 0.5 (rewind 1 of 3)" in text
    assert all(bool(torch.isfinite(t).all()) for t in net.state_dict().values())


def test_rewinds_end(tmp_path: Path) -> None:
    net = start()
    with pytest.raises(TrainingError, match=r"QAT162 .*again after 2 rewinds \(qat.max_rewinds\)"):
        trainer(net, on_nan="rewind", max_rewinds=2, on_step=spoil_weight(5, net, times=9), note=str).run()


def test_bad_data_is_no_reason_to_go_back() -> None:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target + 7)

    with pytest.raises(DataError, match=r"QAT113|QAT112"):
        trainer(loss=lambda out, target: loss(out, target), on_nan="rewind", note=pytest.fail).run()


class StopError(Exception):
    """The process dies here."""


def _diverging(scratch: Path, stop: int = 0) -> Trainer:
    """A training whose objective is NaN in step 10 unless the learning rate is below 0.03."""
    net = start()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)

    def numbered(epoch: int, first: int) -> Any:
        for number, (inputs, labels) in enumerate(batches(epoch, first), start=first):
            yield inputs, (labels, (epoch - 1) * STEPS + number)

    def loss(out: Tensor, target: tuple[Tensor, int]) -> Tensor:
        bad = target[1] == 10 and optimizer.param_groups[0]["lr"] > 0.03
        return F.cross_entropy(out, target[0]) * (math.nan if bad else 1.0)

    def on_step(step: int, total: int, loss: float) -> None:
        if step == stop:
            raise StopError

    changes = {"on_nan": "rewind", "schedule": "constant", "note": lambda text: None}
    return trainer(net, scratch, optimizer=optimizer, batches=numbered, loss=loss, on_step=on_step, **changes)


@pytest.mark.parametrize("stop", [8, 9, 10, 11, 13, 18])
def test_a_rewound_training_resumes_to_the_same_bytes(tmp_path: Path, stop: int) -> None:
    """Whether the process ends before the NaN, after going back, or later."""
    whole = _diverging(tmp_path / "whole")
    wanted = whole.run()
    assert wanted.rewinds == 1
    with pytest.raises(StopError):
        _diverging(tmp_path / "cut", stop).run()
    resumed = _diverging(tmp_path / "cut")
    assert str(resumed.run()) == str(wanted)
    assert all(torch.equal(t, state(whole.model)[n]) for n, t in state(resumed.model).items())


def test_the_exact_forward_goes_back_too() -> None:
    """Weights that are not finite have no integers; that is the training's fault, not the configuration's."""
    net, said = start(0.0), list[str]()
    changes: dict[str, Any] = {"forward": "exact", "on_nan": "rewind", "note": said.append}
    assert trainer(net, on_step=spoil_weight(STEPS + 2, net), **changes).run().rewinds == 1
    assert "hidden.weight holds 1 of 16 values that are not finite" in said[0]


def test_a_last_batch_of_one_is_refused_before_the_first_step() -> None:
    """Batch norm in a module that is kept whole trains on its batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    one = calibrated(net, clouds(0)[0], leaf=["1"])
    steps: list[int] = []

    def last_of_one(epoch: int, first: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for k, ((x,), labels) in enumerate(batches(epoch, first), start=first):
            rows = slice(1) if k == STEPS - 1 else slice(None)
            yield (x[rows],), labels[rows]

    training = trainer(
        one, batches=last_of_one, score=lambda model: Scores(0.0, 0.0), on_step=lambda *step: steps.append(step[0]),
        items=lambda epoch, batch: items(epoch, batch)[: 1 if batch == STEPS - 1 else None],
    )  # fmt: skip
    with pytest.raises(DataError, match="QAT194 the last batch of an epoch: is one item, and batch norm") as caught:
        training.run()
    assert "qat.batch_size" in caught.value.fix
    assert steps == []
