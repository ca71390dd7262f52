"""Checkpoints: no code is run from them, nothing is loaded halfway, equal content gives equal bytes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qatlib.errors import CheckpointError
from qatlib.pipeline.checkpoint import load_into, load_weights, read_metadata, save_tensors


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())


def failure(path: Path, model: nn.Module | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_into(model, path) if model is not None else load_weights(path)
    assert str(path) in str(caught.value)
    return caught.value


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    source, target = net(), net()
    save_tensors(tmp_path / "w.safetensors", source.state_dict(), {"stage": "qat", "epoch": "3"})
    load_into(target, tmp_path / "w.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    assert read_metadata(tmp_path / "w.safetensors") == {"stage": "qat", "epoch": "3"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model_state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.pth"])
def test_torch_files_are_unwrapped(tmp_path: Path, wrap: Any, name: str) -> None:
    source, target = net(), net()
    torch.save(wrap(dict(source.state_dict())), tmp_path / name)
    load_into(target, tmp_path / name)
    assert torch.equal(source[0].weight, target[0].weight)


def test_a_pickle_that_runs_code_is_refused_unread(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"state_dict": Evil(marker)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(marker)))
    for name in ("zip.pt", "raw.pt"):
        error = failure(tmp_path / name)
        assert error.code == "QAT122"
        assert "could run code" in str(error)
        assert "state_dict()" in error.fix
    assert not marker.exists()


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "model.pt")
    error = failure(tmp_path / "model.pt")
    assert error.code == "QAT122"
    assert "torch.nn.modules.container.Sequential" in str(error)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_truncated(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(net(64).state_dict(), path)
    else:
        save_tensors(path, net(64).state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert failure(path).code == "QAT121"


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_garbage_empty_missing_and_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert failure(path).code == "QAT120"
    assert "does not exist" in str(failure(path))
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in str(failure(path))
    path.write_bytes(b"<html>not found</html>" * 20)
    assert failure(path).code == "QAT121"
    path.unlink()
    path.mkdir()
    assert "is a folder" in str(failure(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (torch.zeros(3), "holds a Tensor, not tensors by name"),
        ([1, 2], "holds a list"),
        ({"weight": torch.zeros(1), "epoch": 3}, "entries that are no tensors: epoch (int)"),
        ({}, "holds no tensors"),
    ],
)
def test_not_a_state_dict(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    error = failure(tmp_path / "w.pt")
    assert error.code == "QAT123"
    assert expected in str(error)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"x")
    assert failure(tmp_path / "w.onnx").code == "QAT123"


def test_names_that_do_not_match(tmp_path: Path) -> None:
    state = net().state_dict()
    state["0.wieght"] = state.pop("0.weight")
    save_tensors(tmp_path / "w.safetensors", state)
    error = failure(tmp_path / "w.safetensors", net())
    assert error.code == "QAT124"
    assert "lacks 1 of 7 tensors: 0.weight" in str(error)
    assert "0.wieght may be 0.weight" in str(error)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", {f"x{index}": torch.zeros(1) for index in range(9)})
    assert "has 9 that the model lacks: x0, x1, x2, x3, x4 and 4 more" in str(
        failure(tmp_path / "w.safetensors", net())
    )


def test_shapes_that_do_not_match(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", net(4).state_dict())
    error = failure(tmp_path / "w.safetensors", net(8))
    assert error.code == "QAT125"
    assert "0.weight is [4, 3, 3, 3] in the file and [8, 3, 3, 3] in the model" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_model_alone(tmp_path: Path, value: float) -> None:
    state = net().state_dict()
    state["1.running_var"][2] = value
    save_tensors(tmp_path / "w.safetensors", state)
    model = net()
    before = model[0].weight.clone()
    error = failure(tmp_path / "w.safetensors", model)
    assert error.code == "QAT126"
    assert "1.running_var: 1 of 4 values" in str(error)
    assert torch.equal(model[0].weight, before)


def test_bytes_depend_on_content_only(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from qatlib.pipeline.checkpoint import save_tensors\n"
        "t = torch.arange(12.).reshape(3, 4)\n"
        "save_tensors(sys.argv[1], {'b': t.t(), 'a': t}, {key: 'v' for key in 'fedcba'})\n"
    )
    for name in ("one.safetensors", "two.safetensors"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True, cwd=Path(__file__).parents[2])
    shared = torch.arange(12.0).reshape(3, 4)
    metadata = dict.fromkeys("abcdef", "v")
    save_tensors(tmp_path / "three.safetensors", {"a": shared, "b": shared.t()}, metadata)
    contents = {path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(contents) == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_metadata_of_a_foreign_missing_or_broken_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    assert read_metadata(tmp_path / "foreign.safetensors") == {}
    with pytest.raises(CheckpointError, match=r"QAT120"):
        read_metadata(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    with pytest.raises(CheckpointError, match=r"QAT121"):
        read_metadata(tmp_path / "bad.safetensors")
