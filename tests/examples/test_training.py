"""The float training of the examples warp, detector and recurrent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch import Tensor

import examples.detector.train
import examples.recurrent.train
import examples.warp.train
from examples.settings import Settings, load_settings
from examples.training import Example
from qatlib.errors import TrainingError
from qatlib.pipeline.config import load_config
from qatlib.pipeline.data import loader, open_split
from qatlib.pipeline.entry import load_entry
from qatlib.pipeline.metrics import evaluate, make_metric
from tests.examples import committed
from tests.examples.needed import available

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "warp": examples.warp.train.EXAMPLE,
    "detector": examples.detector.train.EXAMPLE,
    "recurrent": examples.recurrent.train.EXAMPLE,
}
OUTPUTS = ("float.safetensors", "metrics.json")


@pytest.fixture
def images(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in's images enlarged to 28×28."""
    from examples.fashion_mnist import data

    build = data.build

    def enlarged(*args: Any, **kwargs: Any) -> Any:
        small = build(*args, **kwargs)
        pixels = small.tensors[0].repeat_interleave(14, 2).repeat_interleave(14, 3)
        return torch.utils.data.TensorDataset(pixels, small.tensors[1])

    monkeypatch.setattr(data, "build", enlarged)
    return root


def example(name: str) -> Example:
    """The example, with the data builder that the stand-in is put under."""
    found = EXAMPLES[name]
    return replace(found, data=load_entry(f"{found.data.__module__}:build"))


def settings(root: Path, limit: int, **changes: Any) -> Settings:
    values = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "weight_decay": 1e-2, "seed": 0, "threads": 1} | changes
    return Settings.model_validate({"data": {"root": str(root), "limit": limit}, "train": values})


def outputs(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in OUTPUTS]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_settings_give_the_same_bytes(name: str, images: Path, tmp_path: Path) -> None:
    kwargs = {"hidden": 8} if name == "recurrent" else {"width": 4}
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        returned = example(name).train(settings(images, 24, seed=seed), kwargs, tmp_path / folder)
        torch.rand(3)
    assert outputs(tmp_path / "first") == outputs(tmp_path / "again")
    assert outputs(tmp_path / "first")[0] != outputs(tmp_path / "other")[0]
    written = json.loads((tmp_path / "other" / "metrics.json").read_text())["train_float"]
    assert written == {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in returned.items()}
    assert (written["train_images"], written["val_images"], written["test_images"]) == (24, 24, 24)
    net = example(name).model(**kwargs)
    net.load_state_dict(load_file(tmp_path / "other" / "float.safetensors"))
    assert written["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    metric = "map50" if name == "detector" else "accuracy"
    test = example(name).data("test", root=images, limit=24)
    assert example(name).measure(net, test)[metric] == pytest.approx(written[f"test_{metric}"], abs=1e-6)


def test_a_loss_that_is_not_finite_ends_the_training(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"QAT166 float training epoch \d step \d+: the loss is (nan|inf)"):
        example("warp").train(settings(images, 64, lr=1e30), {"width": 4}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def project(images: Path, tmp_path: Path) -> Path:
    """A folder in the place of the recurrent example's, with parameters for the stand-in."""
    folder = tmp_path / "project"
    folder.mkdir()
    YAML().dump(settings(images, 24).model_dump(), folder / "train.yaml")
    params = (ROOT / "examples/recurrent/params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("{kind: gru, hidden: 64}", "{kind: lstm, hidden: 8}"))
    return folder


def test_the_command_trains_the_model_of_params(project: Path) -> None:
    result = CliRunner().invoke(example("recurrent").command(), ["--folder", str(project)])
    assert result.exit_code == 0, result.output
    assert "epoch 2: val accuracy" in result.stderr
    assert result.stdout == ""
    assert load_file(project / "float.safetensors")["rnn.weight_hh_l0"].shape == (4 * 8, 8)


@pytest.mark.parametrize(
    ("file", "old", "new", "code"),
    [("params.yaml", "kind: lstm", "kind: rnn", "QAT105"), ("train.yaml", "epochs: 2", "epochs: 0", "QAT101")],
)
def test_a_user_error_is_one_message(project: Path, file: str, old: str, new: str, code: str) -> None:
    text = (project / file).read_text()
    assert old in text
    (project / file).write_text(text.replace(old, new))
    result = CliRunner().invoke(example("recurrent").command(), ["--folder", str(project)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {code}")
    assert not any((project / name).exists() for name in OUTPUTS)


def test_an_interrupt_leaves_the_outputs_of_the_run_before(project: Path) -> None:
    for name in OUTPUTS:
        (project / name).write_bytes(b"before")
    steps = iter(range(3))

    def interrupted(scores: Tensor, labels: Tensor) -> Tensor:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(scores, labels)

    command = replace(example("recurrent"), loss=interrupted).command()
    result = CliRunner().invoke(command, ["--folder", str(project)])
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert outputs(project) == [b"before", b"before"]
    assert sorted(path.name for path in project.iterdir()) == sorted([*OUTPUTS, "params.yaml", "train.yaml"])


# -- the files of each folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_entry_points_of_params_are_what_was_trained(
    name: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ROOT / "examples" / name
    config, trained = load_config(folder / "params.yaml"), load_settings(folder / "train.yaml")
    monkeypatch.chdir(folder)
    assert load_entry(config.model.factory) is EXAMPLES[name].model
    assert config.data.kwargs == trained.data.model_dump(exclude_defaults=True)
    assert trained.train.threads == 1
    for path in (config.model.code, config.data.code, config.compile.target):
        assert Path(path).is_file(), path
    limited = config.data.model_copy(update={"kwargs": {"root": str(images), "limit": 24}})
    dataset = open_split(config.model_copy(update={"data": limited}), "test")
    net = example(name).model(**config.model.kwargs).eval()
    metric = make_metric(config.metric.factory, config.metric.kwargs)
    done = evaluate(net, loader(dataset, 8), metric)
    assert done.value == pytest.approx(example(name).measure(net, dataset)[metric.name], abs=1e-6)  # type: ignore[arg-type]
    inputs, targets = next(iter(loader(dataset, 8)))
    assert bool(torch.isfinite(load_entry(config.qat.loss)(net(*inputs), targets)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_committed_metrics_are_of_the_shipped_settings_and_good(name: str) -> None:
    folder = ROOT / "examples" / name
    metrics = committed.document(f"examples/{name}/metrics.json")["train_float"]
    config = load_config(folder / "params.yaml")
    assert metrics["epochs"] == load_settings(folder / "train.yaml").train.epochs
    net = EXAMPLES[name].model(**config.model.kwargs)
    assert metrics["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    value = metrics["test_map50" if name == "detector" else "test_accuracy"]
    assert config.float_check.floor is not None
    assert value >= config.float_check.floor


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_training_again_gives_the_committed_metrics(name: str, tmp_path: Path) -> None:
    folder = ROOT / "examples" / name
    kwargs = load_config(folder / "params.yaml").model.kwargs
    before = committed.document(f"examples/{name}/metrics.json")["train_float"]
    with available():
        again = EXAMPLES[name].train(load_settings(folder / "train.yaml"), kwargs, tmp_path)
    assert set(again) == set(before)
    for key, value in before.items():
        # Other float kernels train another network of the same quality.
        assert again[key] == (value if isinstance(value, int) else pytest.approx(value, rel=0.05, abs=0.02)), key
