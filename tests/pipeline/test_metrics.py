"""Metrics: accuracy against a NumPy recount, refusal of what has no value, metric files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatlib.errors import ConfigError, DataError, TrainingError
from qatlib.pipeline.metrics import Accuracy, evaluate, make_metric, ratio, write_metrics


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 6), topk=st.integers(1, 6))
def test_accuracy_equals_a_stable_sort(seed: int, classes: int, topk: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(-2, 3, (20, classes)).astype(np.float32)
    labels = generator.integers(0, classes, 20)
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
    expected = np.mean([label in row for label, row in zip(labels, ranked, strict=True)])
    metric = Accuracy(topk)
    for part in (slice(0, 7), slice(7, 20)):
        metric.update(torch.from_numpy(scores[part]), torch.from_numpy(labels[part]))
    assert metric.compute() == pytest.approx(expected)


def test_accuracy_per_pixel() -> None:
    scores, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    metric = Accuracy()
    metric.update(scores, labels)
    assert metric.compute() == pytest.approx(float((scores.argmax(1) == labels).float().mean()))


@pytest.mark.parametrize(("label", "seen"), [(3, "the first is 3"), (-1, "the first is -1"), (255, "the first is 255")])
def test_labels_out_of_range(label: int, seen: str) -> None:
    with pytest.raises(DataError) as caught:
        Accuracy().update(torch.zeros(4, 3), torch.tensor([0, label, label, 2]))
    assert caught.value.code == "QAT113"
    assert "2 of 4 labels" in str(caught.value)
    assert seen in str(caught.value)
    assert "3 classes, so labels are 0 to 2" in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long)),
        (torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long)),
        ([torch.zeros(4, 3)], torch.zeros(4, dtype=torch.long)),
    ],
)
def test_outputs_and_targets_that_do_not_fit(outputs: Any, targets: Tensor) -> None:
    with pytest.raises(DataError, match=r"QAT114"):
        Accuracy().update(outputs, targets)


@pytest.mark.parametrize("topk", [0, 1.5, "1", True])
def test_illegal_topk(topk: Any) -> None:
    with pytest.raises(ConfigError, match=r"QAT105 metric.kwargs.topk"):
        Accuracy(topk)


def test_accuracy_of_nothing() -> None:
    with pytest.raises(DataError, match=r"QAT110"):
        Accuracy().compute()


def batches(*sizes: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    return [((torch.eye(3)[torch.arange(size) % 3],), torch.zeros(size, dtype=torch.long)) for size in sizes]


def test_evaluate_counts_images_of_uneven_batches() -> None:
    result = evaluate(lambda x: x, batches(3, 1), Accuracy())
    assert (result.value, result.images) == (0.5, 4)


def test_evaluate_makes_no_gradients() -> None:
    layer = torch.nn.Linear(3, 3)
    grads: list[bool] = []

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = layer(inputs)
        grads.append(outputs.requires_grad)
        return outputs

    evaluate(forward, batches(3), Accuracy())
    assert grads == [False]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (torch.zeros(1), x), lambda x: {"a": [x]}])
def test_nan_output_stops_the_evaluation(wrap: Any) -> None:
    def forward(inputs: Tensor) -> Any:
        return wrap(inputs if inputs.shape[0] == 3 else inputs * float("nan"))

    class Ignoring(Accuracy):
        def update(self, outputs: Any, targets: Tensor) -> None:
            pass

    with pytest.raises(TrainingError, match=r"QAT168 model output batch 1: 6 of 6 values are NaN"):
        evaluate(forward, batches(3, 2), Ignoring())


def test_nan_value_and_no_batches() -> None:
    class Broken(Accuracy):
        def compute(self) -> float:
            return float("nan")

    with pytest.raises(TrainingError, match=r"QAT168 metric accuracy: is nan over 3 items"):
        evaluate(lambda x: x, batches(3), Broken())
    with pytest.raises(DataError, match=r"QAT110 evaluation: got no batches"):
        evaluate(lambda x: x, [], Accuracy())


def test_make_metric() -> None:
    metric = make_metric("qatlib.pipeline.metrics:Accuracy", {"topk": 5})
    assert metric.name == "accuracy_top5"
    assert metric.higher_is_better
    with pytest.raises(ConfigError, match=r"QAT106 metric.factory: .* without name, higher_is_better, compute"):
        make_metric("builtins:dict", {})


def test_metric_file_is_deterministic_and_rounded(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "metrics.json"
    write_metrics(path, "calibrate", {"b": 0.123456789, "a": 3, "c": 1234567.0})
    assert json.loads(path.read_text()) == {"calibrate": {"a": 3, "b": 0.123457, "c": 1234570.0}}
    first = path.read_bytes()
    write_metrics(path, "calibrate", {"c": 1234567.0, "a": 3, "b": 0.123456789})
    assert path.read_bytes() == first
    assert first.index(b'"a"') < first.index(b'"b"')


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metric_file_refuses_what_is_not_finite(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("before")
    with pytest.raises(TrainingError, match=r"QAT169 .* qat.loss: is"):
        write_metrics(path, "qat", {"ok": 1.0, "loss": value})
    assert path.read_text() == "before"


@pytest.mark.parametrize("value", [True, "0.5", {"a": 1.0}, None])
def test_metric_file_refuses_what_is_no_number(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"qat.x is a"):
        write_metrics(tmp_path / "m.json", "qat", {"x": value})


def test_ratio() -> None:
    assert ratio(0.45, 0.9, True) == 0.5
    assert ratio(2.0, 1.0, False) == 0.5
    assert ratio(0.0, 0.9, True) == 0.0
    assert ratio(0.0, 0.0, False) == 1.0
    for stage_value, float_value, higher in ((0.5, 0.0, True), (0.0, 1.0, False), (-1.0, 2.0, True)):
        with pytest.raises(DataError, match=r"QAT115"):
            ratio(stage_value, float_value, higher)
