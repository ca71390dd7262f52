"""``model.unshare``: a module for every call, in every stage, with weights that are tied or train apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.errors import GraphError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.graph.unshare import get_module_called_count
from qatlib.pipeline.config import Config
from qatlib.pipeline.project import Project
from tests.graph.test_unshare import shared
from tests.models import images
from tests.pipeline.conftest import Enter

USER = """
import torch
from torch.utils.data import TensorDataset
from tests.graph.test_unshare import shared
from tests.models import images


def data(split):
    return TensorDataset(images(32, 3, 8), torch.arange(32) % 10)
"""


@pytest.fixture
def folder(enter: Enter) -> Path:
    return enter(USER, shared().state_dict())


def project(unshare: Any = None, tied: bool = True, **sections: Any) -> Project:
    model = {"factory": "their:shared", "checkpoint": "float.safetensors", "code": "their.py", "unshare_tied": tied}
    if unshare is not None:
        model["unshare"] = unshare
    data = {"factory": "their:data", "code": "their.py", "batch_size": 16}
    return Project(Config.model_validate({"model": model, "data": data, **sections}))


def calibrated(made: Project) -> FakeQuantModel:
    fake = made.fake_quant_model()
    calibrate(fake, made.calibration_batches())
    return fake


X = images(4, 3, 8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("unshare", [["head"], ["*"], True, "*", ["re:head.*"]])
def test_float_and_quantized_results_are_those_of_the_shared_model(folder: Path, unshare: Any, tied: bool) -> None:
    plain, apart = project(), project(unshare, tied)
    assert torch.equal(apart.float_model(X), plain.float_model(X))
    assert not apart.float_model.training
    one, other = calibrated(plain), calibrated(apart)
    assert {"head.0.conv", "head.1.conv"} <= {name for name, _ in other.ops()}
    assert torch.equal(other(X), one(X))
    assert torch.equal(convert_fx(other)(X), convert_fx(one)(X))


def test_all_means_also_what_is_called_again_inside_of_a_copy(folder: Path) -> None:
    counts = [get_module_called_count(project(names).float_model, [X]) for names in (["head"], ["*"])]
    assert counts[0]["head.0.act"] == 2
    assert counts[1]["head.0.act.0"] == counts[1]["head.0.act.1"] == 1


@pytest.mark.parametrize("unshare", [None, [], False])
def test_nothing_changes_by_default(folder: Path, unshare: Any) -> None:
    assert project(unshare).float_model.state_dict().keys() == shared().state_dict().keys()


@pytest.mark.parametrize("name", ["one", "spare", "hed", "head.con"])
def test_a_name_that_is_not_called_twice_is_one_error_with_those_that_are(folder: Path, name: str) -> None:
    with pytest.raises(GraphError, match=rf"QAT206 model\.unshare\[1\] '{name}': .*head \(2 calls\), head\.conv") as e:
        _ = project(["head", name]).float_model
    assert "head.act (4 calls)" in str(e.value)


def test_one_call_has_its_own_format(folder: Path) -> None:
    section = {"overrides": [{"match": "head.1.conv", "activation": "int16"}]}
    fake = project(["head"], qconfig=section).fake_quant_model()
    assert (fake.dtype("head.0.conv"), fake.dtype("head.1.conv")) == ("int8", "int16")


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_the_unshared_model_loads_and_trains_tied_or_apart(folder: Path, tied: bool) -> None:
    made = project(["head"], tied)
    fake = calibrated(made)
    made.save_fake_quant(fake, "calibrated.safetensors")
    loaded = project(["head"], tied).load_fake_quant("calibrated.safetensors")
    assert torch.equal(loaded(X), fake(X))
    set_fake_quantize(loaded.train(), FakeQuantState.QAT)
    F.mse_loss(loaded(X), torch.zeros_like(loaded(X))).backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    first, second = (loaded.op(f"head.{k}.conv").weight for k in range(2))
    assert not torch.equal(first, fake.op("head.0.conv").weight), "it was trained"
    assert torch.equal(first, second) == tied
    made.save_fake_quant(loaded, "qat.safetensors")
    set_fake_quantize(loaded.eval(), FakeQuantState.VALIDATION)
    again = project(["head"], tied).load_fake_quant("qat.safetensors")
    set_fake_quantize(again, FakeQuantState.VALIDATION)
    assert torch.equal(again(X), loaded(X))
