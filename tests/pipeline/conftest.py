"""A project on disk that is not the bundled example, run through the real dvc.yaml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from torch import Tensor

from qatlib.pipeline.checkpoint import save_tensors
from tests.pipeline import tiny

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "model": {"factory": "tiny:build_model", "checkpoint": "float.safetensors", "code": "tiny.py"},
    "data": {"factory": "tiny:build_data", "code": "tiny.py", "batch_size": 64},
    "calibrate": {"batches": 2, "batch_size": 32},
    "qat": {"epochs": 2, "batch_size": 64, "lr": 0.01, "integer_eval_images": None},
    "compile": {"check_images": 16},
    "analyze": {"batches": 1, "batch_size": 32},
    "float_check": {"floor": 0.5, "gap_images": 128},
    "goals": [{"metric": "ratio.integer", "min": 0.9}],
}

Enter = Callable[[str, Mapping[str, Tensor]], Path]


class Repository:
    """A folder with git, DVC and the pipeline; commands run in it as a user would type them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DVC")},
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t",
        }  # fmt: skip

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def stage(self, name: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", f"stages.{name}", check=check)

    def set(self, **sections: Any) -> None:
        """Change values of params.yaml."""
        yaml, path = YAML(), self.folder / "params.yaml"
        document = yaml.load(path.read_text())
        for section, values in sections.items():
            if isinstance(values, dict):
                document[section].update(values)
            else:
                document[section] = values
        with path.open("w") as file:
            yaml.dump(document, file)

    def copy(self, folder: Path) -> Repository:
        shutil.copytree(self.folder, folder, symlinks=True)
        return Repository(folder)


def lay_out(folder: Path) -> Repository:
    """The files alone: stages run there, DVC does not."""
    for name in ("qatlib", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", "constraints.txt", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(Path(tiny.__file__), folder / "tiny.py")
    save_tensors(folder / "float.safetensors", tiny.train())
    repository = Repository(folder)
    repository.set(**SETTINGS)
    return repository


def create(folder: Path) -> Repository:
    repository = lay_out(folder)
    repository.run("git", "init", "-q")
    repository.run("dvc", "init", "-q")
    repository.run("dvc", "config", "core.analytics", "false")
    repository.run("git", "add", "-A")
    repository.run("git", "commit", "-qm", "start")
    return repository


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Goes into a folder with the user's code, ``their.py``, and the weights of the float model."""

    def go(code: str, weights: Mapping[str, Tensor]) -> Path:
        (tmp_path / "their.py").write_text(code)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "their", raising=False)
        save_tensors("float.safetensors", dict(weights))
        return tmp_path

    return go


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Set up, nothing run. Copy it before changing it."""
    return create(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="session")
def finished(fresh: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """After one `dvc repro`, committed. Copy it before changing it."""
    repository = fresh.copy(tmp_path_factory.mktemp("finished") / "project")
    repository.run("dvc", "repro")
    repository.run("git", "add", "-A")
    repository.run("git", "commit", "-qm", "results")
    return repository
