from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML
from safetensors.torch import load_file

from examples.fashion_mnist import data, model, train
from examples.settings import Settings, load_settings
from qatlib.errors import TrainingError
from tests.examples.needed import available

FOLDER = Path(train.__file__).parent
PROJECT = FOLDER.parents[1]
OUTPUTS = ("float.safetensors", "metrics.json")


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def settings(root: Path | None, limit: int | None = 200, **changes: Any) -> Settings:
    values = {"epochs": 2, "batch_size": 32, "lr": 0.05, "weight_decay": 5e-4, "seed": 0, "threads": 1} | changes
    return Settings.model_validate({"data": {"root": root and str(root), "limit": limit}, "train": values})


def outputs(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in OUTPUTS]


def test_the_same_settings_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    train.train(settings(root), first)
    torch.rand(3)
    train.train(settings(root), again)
    train.train(settings(root, seed=1), other)
    assert outputs(first) == outputs(again)
    assert outputs(first)[0] != outputs(other)[0]
    assert sorted(path.name for path in first.iterdir()) == sorted(OUTPUTS)


def test_the_outputs(root: Path, tmp_path: Path) -> None:
    returned = train.train(settings(root), tmp_path)
    text = (tmp_path / "metrics.json").read_text()
    written = json.loads(text)["train_float"]
    assert written == returned
    assert list(written) == sorted(written)
    assert all(isinstance(value, int | float) and value == float(f"{value:.6g}") for value in written.values())
    assert (written["train_images"], written["val_images"], written["parameters"]) == (200, 200, 35_898)
    net = model.build()
    net.load_state_dict(load_file(tmp_path / "float.safetensors"))
    val = data.build("val", root=root, limit=200)
    assert train.evaluate(net, val)[0] == pytest.approx(written["val_accuracy"])


def test_evaluate_counts_hits_and_averages_the_loss(root: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[3].expand(len(x), 10) * 2

    val = data.build("val", root=root, limit=1_500)
    labels = val.tensors[1]
    accuracy, loss = train.evaluate(Fixed(), val)
    assert accuracy == pytest.approx(float((labels == 3).double().mean()))
    expected = torch.where(labels == 3, 2.0, 0.0).double().mean()
    assert loss == pytest.approx(float(torch.tensor(2.0).exp().add(9).log() - expected), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_training(root: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"QAT166 float training epoch \d step \d+: the loss is (nan|inf)"):
        train.train(settings(root, lr=1e30), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def project(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the example's, with parameters for the stand-in."""
    folder = tmp_path / "project"
    folder.mkdir()
    YAML().dump(settings(root).model_dump(), folder / "params.yaml")
    monkeypatch.setattr(train, "FOLDER", folder)
    return folder


def test_the_command_writes_beside_its_params(project: Path) -> None:
    result = CliRunner().invoke(train.main)
    assert result.exit_code == 0, result.output
    assert "epoch 2: val accuracy" in result.stderr
    assert result.stdout == ""
    assert all((project / name).is_file() for name in OUTPUTS)


def test_an_interrupt_leaves_the_outputs_of_the_run_before(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OUTPUTS:
        (project / name).write_bytes(b"before")
    steps = iter(range(3))
    step = train._step

    def interrupted(*args: Any) -> float:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "_step", interrupted)
    result = CliRunner().invoke(train.main)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert outputs(project) == [b"before", b"before"]
    assert sorted(path.name for path in project.iterdir()) == sorted([*OUTPUTS, "params.yaml"])


def test_a_user_error_is_one_message(project: Path) -> None:
    (project / "params.yaml").write_text("train: {epochs: 0}")
    result = CliRunner().invoke(train.main)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: QAT101")


def test_the_shipped_params_are_legal() -> None:
    shipped = load_settings(FOLDER / "params.yaml")
    assert shipped.data.limit is None
    assert shipped.train.threads == 1


@pytest.mark.slow
def test_one_epoch_on_a_part_of_the_real_images_learns(tmp_path: Path) -> None:
    with available():
        data.build("test")
    metrics = train.train(settings(None, limit=10_000, epochs=1, batch_size=64, lr=0.1), tmp_path)
    assert metrics["val_accuracy"] > 0.75
