"""The training as params.yaml asks for it: its data, its parts, relu6, and the metrics of what came out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qatlib.conversion import convert_fx
from qatlib.errors import ConfigError, QConfigError, StateError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.distill import mse
from qatlib.fake.epochs import Epoch
from qatlib.fake.first_loss import FirstLoss
from qatlib.fake.model import set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.fake.train import Trained
from qatlib.pipeline.config import Config
from qatlib.pipeline.metrics import Evaluation
from qatlib.pipeline.project import Project
from qatlib.pipeline.reporting import Shown, write_history
from qatlib.pipeline.training import last_epoch_gain, qat_metrics, trainer_of
from tests.models import everything
from tests.pipeline.conftest import Enter

USER = """
import torch
from torch.utils.data import TensorDataset
from tests.models import everything, images


def build():
    return everything()


def data(split, jitter=0.0, items=40):
    torch.manual_seed(len(split))
    return TensorDataset(images(items) + jitter, torch.arange(items) % 10)
"""


@pytest.fixture
def folder(enter: Enter) -> Path:
    return enter(USER, everything().state_dict())


def project(data: dict[str, Any] | None = None, **qat: Any) -> Project:
    document: dict[str, Any] = {
        "model": {"factory": "their:build", "checkpoint": "float.safetensors", "code": "their.py"},
        "data": {"factory": "their:data", "code": "their.py", "batch_size": 16, **(data or {})},
        "qat": {"epochs": 1, "batch_size": 16, "averaging_constant": 0.0, **qat},
    }
    return Project(Config.model_validate(document))


def calibrated(**qat: Any) -> Project:
    """A project with ``calibrated.safetensors``, made without its ``qat`` settings."""
    plain = project()
    model = plain.fake_quant_model()
    calibrate(model, plain.batches("calib"))
    plain.save_fake_quant(model, "calibrated.safetensors")
    return project(**qat)


def quiet() -> Shown:
    return Shown(lambda step, total, loss: None, lambda text: None)


# -- data --------------------------------------------------------------------------------------------------------------


def test_data_kwargs_are_for_the_train_split_of_qat_alone(folder: Path) -> None:
    made = project(data={"kwargs": {"jitter": 1.0, "items": 20}}, data_kwargs={"jitter": 100.0})
    assert len(made.training_data) == 20  # type: ignore[arg-type]
    assert float(made.training_data[0][0].mean()) > 90
    assert all(float(made.split(split)[0][0].mean()) < 10 for split in ("train", "calib", "val", "test"))


def test_data_kwargs_that_the_factory_does_not_take(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"QAT105 qat.data_kwargs over data.kwargs: .*jiter.*did you mean 'jitter'"):
        _ = project(data_kwargs={"jiter": 1.0}).training_data


def test_items_are_those_of_the_batches(folder: Path) -> None:
    made = calibrated()
    trainer = trainer_of(made, "calibrated.safetensors", folder / "s", quiet())
    assert trainer.steps == 3
    data = made.training_data
    for number, (inputs, _) in enumerate(trainer.batches(2, 0)):
        wanted = torch.stack([data[index][0] for index in trainer.items(2, number)])
        assert torch.equal(inputs[0], wanted)
    assert len(trainer.items(2, 2)) == 8


# -- parts -------------------------------------------------------------------------------------------------------------


def test_the_parts_follow_params(folder: Path) -> None:
    made = calibrated(distill={"weight": 0.25, "loss": "mse"}, integer_eval_images=8)
    trainer = trainer_of(made, "calibrated.safetensors", folder / "s", quiet())
    assert trainer.distillation is not None
    assert trainer.distillation.loss is mse
    assert trainer.distillation.teacher is made.float_model
    assert trainer.full_score is not None, "the sample is not all"
    assert trainer_of(calibrated(integer_eval_images=40), "calibrated.safetensors", folder, quiet()).full_score is None


def test_without_epochs_neither_data_nor_teacher_is_opened(folder: Path) -> None:
    made = calibrated(epochs=0, distill={"weight": 1.0}, data_kwargs={"no": "such"})
    trainer = trainer_of(made, "calibrated.safetensors", folder / "s", quiet())
    assert trainer.distillation is None
    trained = trainer.run()
    values = qat_metrics(made, trained, Evaluation(0.5, 40))
    assert values == {
        "accuracy": 0.5,
        "images": 40,
        "train_images": 0,
        "epochs": 0,
        "best_epoch": 0,
        "val_integer": trained.integer,
        "val_images": 40,
        "nan_rewinds": 0,
    }


def test_the_whole_of_a_training(folder: Path) -> None:
    made = calibrated(epochs=1, integer_eval_images=8, lr=1e-4)
    trained = trainer_of(made, "calibrated.safetensors", folder / "s", quiet()).run()
    values = qat_metrics(made, trained, Evaluation(0.5, 40))
    assert {"first_loss", "first_loss_calibrated", "first_loss_float", "last_epoch_gain"} <= set(values)
    write_history("history.csv", trained.history)
    header, zero, one = Path("history.csv").read_text().splitlines()
    assert header == "epoch,lr,train_loss,float,fake_quant,integer"
    assert zero.startswith("0,0,,")
    assert one.startswith("1,")


# -- metrics -----------------------------------------------------------------------------------------------------------


def _history(*scores: float) -> list[Epoch]:
    return [Epoch(k, 0.1, 0.5, score, score, score) for k, score in enumerate(scores)]


def test_the_gain_of_the_last_epoch() -> None:
    assert last_epoch_gain(_history(0.5, 0.7, 0.75), True) == pytest.approx(0.05)
    assert last_epoch_gain(_history(0.5, 0.7, 0.6), True) == pytest.approx(-0.1)
    assert last_epoch_gain(_history(5.0, 3.0, 2.0), False) == pytest.approx(1.0)


def test_metrics_are_finite(folder: Path) -> None:
    trained = Trained(tuple(_history(0.5, 0.6)), 1, 0.6, FirstLoss(0.5, 0.5, math.nan), 2)
    values = qat_metrics(project(), trained, Evaluation(0.5, 40))
    assert values["nan_rewinds"] == 2
    assert "first_loss_float" not in values
    assert all(math.isfinite(value) for value in values.values())


def test_a_model_is_not_scored_in_the_wrong_state(folder: Path) -> None:
    made = calibrated()
    model = made.load_fake_quant("calibrated.safetensors")
    made.evaluate(model, "val")
    for state, training in ((FakeQuantState.CALIBRATION, False), (FakeQuantState.QAT, False), (None, True)):
        model.train(training)
        set_fake_quantize(model, state or FakeQuantState.VALIDATION)
        with pytest.raises(StateError, match="QAT156 evaluation"):
            made.evaluate(model, "val")


# -- hybrid, relu6 -----------------------------------------------------------------------------------------------------


def test_a_hybrid_list_that_covers_everything(folder: Path) -> None:
    with pytest.raises(QConfigError, match=r"QAT197 qat.hybrid: \['\*'\] leaves no operator to quantize"):
        project(hybrid=["*"]).fake_quant_model()


def test_relu6_is_in_the_trained_model_and_stays_in_its_checkpoint(folder: Path) -> None:
    made = calibrated(relu6=["stem", "re:hidden.*"])
    model = trainer_of(made, "calibrated.safetensors", folder, quiet()).model
    bounded = [name for name, op in model.ops() if op.node.attrs.get("clamp") == [0.0, 6.0]]
    assert bounded == ["stem", "block.conv", "hidden"], "block.conv had relu6"
    made.save_fake_quant(model, "qat.safetensors")
    other = project()  # convert and analyze read no qat.relu6
    again = other.load_fake_quant("qat.safetensors")
    assert [name for name, op in again.ops() if op.node.attrs.get("clamp") == [0.0, 6.0]] == bounded
    x = made.split("val")[0][0][None] * 50
    assert torch.equal(again(x), model(x))
    again.op("stem").activation_post_process.scale.fill_(0.1)
    stem = next(op for op in convert_fx(again).program.ops if op.output == "stem")
    assert (stem.attrs["lo"], stem.attrs["hi"]) == (0, 60), "the clamp is in the integers too"
    plain = other.load_fake_quant("calibrated.safetensors")
    assert plain.op("stem").node.attrs["clamp"] == [0.0, None], "calibration knows nothing of it"


def test_scales_are_limited_to_what_six_needs(folder: Path) -> None:
    made = calibrated(relu6=["stem", "hidden"])
    plain = made.load_fake_quant("calibrated.safetensors")
    for name, scale in (("stem", 1.0), ("hidden", 0.01)):
        plain.op(name).activation_post_process.scale.fill_(scale)
        plain.op(name).activation_post_process.high.fill_(scale * 127)
    made.save_fake_quant(plain, "calibrated.safetensors")
    bounded = made.load_fake_quant("calibrated.safetensors", made.resolve_relu6())
    assert bounded.qtype("stem").scale == pytest.approx(6 / 127.5)
    assert bounded.qtype("hidden").scale == pytest.approx(0.01)
    assert float(bounded.op("stem").activation_post_process.high) == 6.0


def test_relu6_that_names_no_relu(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"QAT102 qat.relu6\[0\]: 'head' matches nothing; known are stem, hidden, relu"
    ):
        project(relu6=["head"]).resolve_relu6()
    with pytest.raises(ConfigError, match=r"QAT102 qat.relu6\[1\]: 'hiden' matches nothing; did you mean 'hidden'"):
        project(relu6=["stem", "hiden"]).resolve_relu6()


@pytest.mark.parametrize("kind", ["lsq", "pact", "tqt"])
def test_fake_quant_names_what_learns(folder: Path, kind: str) -> None:
    """Calibrated and trained checkpoints are read by every kind: no stage but qat depends on it."""
    made = calibrated(fake_quant=kind, optimizer="adam", lr=1e-3)
    one = trainer_of(made, "calibrated.safetensors", folder, quiet())
    learned = {name for name, _ in one.model.named_parameters() if name.endswith("learned")}
    assert "stem.activation_post_process.learned" in learned
    assert ("stem.weight_fake_quant.learned" in learned) == (kind != "pact")
    one.run()
    made.save_fake_quant(one.model, "qat.safetensors")
    again = made.load_fake_quant("qat.safetensors")
    x = made.split("val")[0][0][None]
    assert torch.equal(again(x), one.model(x))
    plain = project().load_fake_quant("qat.safetensors")
    assert plain.qtype("stem") == again.qtype("stem")
