"""The switches of section ``calibrate`` through checkpoints, conversion and analysis."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qatlib.analysis.profiler import capture_pair
from qatlib.conversion import convert_fx
from qatlib.errors import StateError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.float_form import float_form
from qatlib.fake.model import FakeQuantModel
from qatlib.pipeline.after_training import Helped, float_side, help_after_training
from qatlib.pipeline.checkpoint import save_tensors
from qatlib.pipeline.project import Project
from tests.models import images
from tests.pipeline.test_project import config, folder  # noqa: F401 folder is a fixture

QUICK = {"steps": 5, "images": 16, "batch_size": 8}
SWITCHES: dict[str, dict[str, Any]] = {
    "equalize": {"equalize": True},
    "adaround": {"adaround": QUICK},
    "bn_re_estimation": {"bn_re_estimation": True},
    "bias_correction": {"bias_correction": True},
    "all": {"equalize": True, "adaround": QUICK, "bn_re_estimation": True, "bias_correction": True},
}
Made = tuple[Project, FakeQuantModel, Helped]
OPEN = {"model": {"factory": "their:open_net", "checkpoint": "open.safetensors"}}
"""A net with a pair to equalize."""
NET = """

class OpenNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.each, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 10)
        with torch.no_grad():
            self.stem.weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1, 1))
            self.norm.running_var.mul_(0.3)

    def forward(self, x):
        return self.head(torch.relu(self.each(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def open_net():
    return OpenNet()
"""


def write_net(folder: Path) -> None:  # noqa: F811
    their = folder / "their.py"
    their.write_text(their.read_text() + NET)
    save_tensors("open.safetensors", import_module("their").open_net().state_dict())


@pytest.fixture
def made(folder: Path, request: pytest.FixtureRequest) -> Made:  # noqa: F811
    """A project with the switches of the parameter, and its calibrated model, saved."""
    write_net(folder)
    project = Project(config(calibrate={"batches": 2, "batch_size": 16, **request.param}, **OPEN))
    model = project.fake_quant_model(equalized=project.config.calibrate.equalize)
    calibrate(model, project.calibration_batches())
    helped = help_after_training(project, model)
    project.save_fake_quant(model, "calibrated.safetensors", helped.done)
    return project, model, helped


def same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("made", SWITCHES.values(), ids=SWITCHES.keys(), indirect=True)
def test_what_was_done_survives_a_checkpoint_and_a_conversion(made: Made) -> None:
    project, model, helped = made
    section = project.config.calibrate
    assert list(helped.done) == [
        key for key in ("equalize", "adaround", "bn_re_estimation", "bias_correction") if getattr(section, key)
    ]
    loaded = Project(config(**OPEN)).load_fake_quant("calibrated.safetensors")
    x = images(8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(convert_fx(loaded)(x), convert_fx(model)(x))
    assert not loaded.trained


@pytest.mark.parametrize("made", SWITCHES.values(), ids=SWITCHES.keys(), indirect=True)
def test_analysis_compares_with_the_float_function_in_the_units_of_the_checkpoint(
    made: Made,
) -> None:
    project, _, helped = made
    fresh = Project(config(**OPEN))  # analyze does not read section calibrate
    loaded = fresh.load_fake_quant("calibrated.safetensors")
    side, x = float_side(fresh, "calibrated.safetensors"), images(8)
    with torch.no_grad():
        assert same(side(x), project.float_model(x))
    seen = capture_pair(side, loaded, x, "FvsQ")
    worst = {record.name: record.accumulated.sqnr_db for record in seen.records if record.accumulated}
    assert set(worst) == {name for name, _ in loaded.ops()}
    assert min(worst.values()) > 15, worst
    if len(helped.done) > 1:
        with pytest.raises(StateError, match="QAT158"):
            capture_pair(fresh.float_model, loaded, x, "FvsQ")


@pytest.mark.parametrize("made", [SWITCHES["equalize"]], indirect=True)
def test_equalizing_leaves_the_float_function_and_says_what_it_did(made: Made) -> None:
    project, model, helped = made
    with torch.no_grad():
        x = images(4)
        assert same(float_form(model, x), project.float_model(x))
        assert not same(model.op("each").weight, project.float_model.get_parameter("each.weight"))
    assert helped.metrics["equalized_pairs"] == 2
    assert helped.metrics["widest_channels_after"] < helped.metrics["widest_channels_before"]


@pytest.mark.parametrize("made", [{"equalize": False}], ids=["none"], indirect=True)
def test_without_a_switch_nothing_is_done(made: Made) -> None:
    project, _, helped = made
    assert (helped.done, helped.metrics) == ((), {})
    assert float_side(project, "calibrated.safetensors") is project.float_model


def test_a_scale_of_the_user_keeps_its_unit(folder: Path) -> None:  # noqa: F811
    write_net(folder)
    fixed = {"overrides": [{"match": "stem", "scale": 0.0625}]}
    project = Project(config(calibrate={"equalize": True}, qconfig=fixed, **OPEN))
    assert [pair.producer for pair in project.equalized[1]] == ["each"]
