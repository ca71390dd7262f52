"""A project with one planted bad layer: the outputs of ``a`` are decades apart, and ``b`` undoes it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from qatlib.fake.calibrate import calibrate
from qatlib.pipeline.checkpoint import save_tensors
from qatlib.pipeline.config import load_config
from qatlib.pipeline.conversion import program_of
from qatlib.pipeline.project import Project

PLANTED = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Planted(nn.Module):
    """``a`` makes values up to four decades apart; labels are what the float network says."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16)
        self.c = nn.Linear(16 * 36, 4)

    def forward(self, x):
        return self.c(nn.functional.avg_pool2d(torch.relu(self.b(torch.relu(self.a(x)))), 3).flatten(1))


def build():
    torch.manual_seed(3)
    net = Planted()
    units = torch.logspace(-2, 2, 16)[torch.randperm(16)]
    with torch.no_grad():
        net.a.weight.mul_(units.view(-1, 1, 1, 1))
        net.a.bias.mul_(units)
        net.b.weight.div_(units.view(-1, 1, 1, 1))
    return net.eval()


def data(split):
    seed = ["train", "calib", "val", "test"].index(split)
    x = torch.randn(128, 3, 20, 20, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return TensorDataset(x, build()(x).argmax(1))
'''
PARAMS: dict[str, Any] = {
    "model": {"factory": "planted_net:build", "checkpoint": "float.safetensors", "code": "planted_net.py"},
    "data": {"factory": "planted_net:data", "code": "planted_net.py", "batch_size": 128},
    "qconfig": {"default": {"activation": "int8", "weight": "int8"}, "overrides": [], "inputs": []},
    "calibrate": {"batches": 4, "batch_size": 64},
    "qat": {"epochs": 0},
    "compile": {"target": "bayes-like"},
}


class Planted:
    """The project on disk; :meth:`ship` makes its artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, **sections: Any) -> None:
        """Write ``params.yaml``."""
        text = {key: {**PARAMS.get(key, {}), **sections.get(key, {})} for key in {**PARAMS, **sections}}
        with (self.folder / "params.yaml").open("w") as file:
            YAML().dump(text, file)

    def ship(self) -> Project:
        """Calibrate and convert as the stages do."""
        project = Project(load_config())
        model = project.fake_quant_model()
        calibrate(model, project.calibration_batches())
        project.save_fake_quant(model, "artifacts/qat.safetensors")
        program_of(project, model).save("artifacts/program")
        return project


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with its artifacts, all int8. Copy it before changing it."""
    folder, before = tmp_path_factory.mktemp("planted"), Path.cwd()
    deterministic = torch.are_deterministic_algorithms_enabled()
    (folder / "planted_net.py").write_text(PLANTED)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        import planted_net  # type: ignore[import-not-found]

        save_tensors("float.safetensors", planted_net.build().state_dict())
        planted = Planted(folder)
        planted.set()
        planted.ship()
    finally:
        sys.path.remove(str(folder))
        os.chdir(before)
        torch.use_deterministic_algorithms(deterministic)
    return folder


@pytest.fixture
def planted(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planted]:
    """A copy, as the working directory."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    folder = tmp_path / "project"
    shutil.copytree(shipped, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield Planted(folder)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
