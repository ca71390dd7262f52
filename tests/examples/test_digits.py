from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import fx

pytest.importorskip("sklearn", reason="the digits come from scikit-learn: pip install -e '.[examples]'")

from sklearn.datasets import load_digits

from examples.digits import train
from examples.digits.digits import build_data, build_model

SIZES = {"train": 1_149, "val": 160, "calib": 128, "test": 360}


def test_splits_are_all_images_once() -> None:
    splits = {split: build_data(split) for split in SIZES}
    assert {split: len(data) for split, data in splits.items()} == SIZES
    seen = torch.cat([data.images for data in splits.values()]).flatten(1)
    bunch = load_digits()
    expected = torch.from_numpy(bunch.data).float() / 8 - 1
    assert sorted(seen.tolist()) == sorted(expected.tolist())


def test_items() -> None:
    data = build_data("calib")
    image, digit = data[5]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert type(digit) is int
    assert (float(data.images.min()), float(data.images.max())) == (-1, 1)
    assert set(data.digits) == set(range(10))


def test_digits_stay_with_their_images() -> None:
    bunch = load_digits()
    known = {tuple(pixels): digit for pixels, digit in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True)}
    data = build_data("test")
    assert [known[tuple(((image + 1) * 8).flatten().tolist())] for image in data.images] == data.digits


def test_the_model_traces_to_functions() -> None:
    torch.manual_seed(0)
    net = build_model().eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == 11_578
    traced = fx.symbolic_trace(net)
    images = build_data("calib").images[:4]
    assert traced(images).equal(net(images))
    assert net(images).shape == (4, 10)
    functions = {getattr(node.target, "__name__", "") for node in traced.graph.nodes if node.op == "call_function"}
    assert {"relu", "add", "flatten"} <= functions


def test_a_few_epochs_learn() -> None:
    assert train.accuracy(train.train(epochs=3), build_data("val")) > 0.8


@pytest.mark.slow
def test_the_command_writes_the_same_good_weights_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT", tmp_path / "float.safetensors")
    threads = torch.get_num_threads()
    train.main()
    first = train.CHECKPOINT.read_bytes()
    train.main()
    torch.set_num_threads(threads)
    assert train.CHECKPOINT.read_bytes() == first
    assert "test  accuracy" in capsys.readouterr().out
    net = build_model()
    net.load_state_dict(load_file(train.CHECKPOINT))
    assert train.accuracy(net.eval(), build_data("test")) > 0.97
