"""Metrics: the protocol, top-k accuracy, evaluation, and the metric files of the stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qatlib.atomic import write_json
from qatlib.errors import ConfigError, DataError, TrainingError
from qatlib.pipeline.entry import call_entry


@runtime_checkable
class Metric(Protocol):
    """One number over a whole split. A fresh object is made for each evaluation."""

    name: str
    higher_is_better: bool

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in one batch: what the model returned and the targets, on the same device."""

    def compute(self) -> float:
        """The value over all batches so far."""


class Accuracy:
    """Share of items whose label is among the ``topk`` highest scores.

    Outputs are ``[N, C, …]`` scores, targets ``[N, …]`` integer labels below C. Of equal scores, which are common in
    integer networks, the lower class index ranks first, on every device.
    """

    higher_is_better = True

    def __init__(self, topk: int = 1) -> None:
        if not isinstance(topk, int) or isinstance(topk, bool) or topk < 1:
            raise ConfigError("QAT105", "metric.kwargs.topk", f"is {topk!r}; must be an integer >= 1", "Use 1 or 5")
        self.name = "accuracy" if topk == 1 else f"accuracy_top{topk}"
        self._topk, self._hits, self._items = topk, 0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch; raises DataError QAT113 for labels out of range, QAT114 for shapes that do not fit."""
        self._check(outputs, targets)
        labels = targets.long().unsqueeze(1)
        score = outputs.gather(1, labels)
        classes = torch.arange(outputs.shape[1], device=outputs.device).reshape(1, -1, *[1] * (outputs.ndim - 2))
        ahead = (outputs > score) | ((outputs == score) & (classes < labels))
        self._hits += int((ahead.sum(1) < self._topk).sum())
        self._items += targets.numel()

    def compute(self) -> float:
        if self._items == 0:
            raise DataError("QAT110", self.name, "has seen no items", "Evaluate at least one batch")
        return self._hits / self._items

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            raise DataError(
                "QAT114",
                "metric accuracy",
                f"got outputs of type {type(outputs).__name__} and targets of type {type(targets).__name__}",
                "Return one score tensor from the model and integer labels from the dataset, or name another metric",
            )
        if outputs.ndim < 2 or targets.shape != outputs.shape[:1] + outputs.shape[2:] or targets.is_floating_point():
            raise DataError(
                "QAT114",
                "metric accuracy",
                f"got outputs {list(outputs.shape)} and {targets.dtype} targets {list(targets.shape)}; "
                "expected scores [N, C, ...] and integer labels [N, ...]",
                "Return class indices (not one-hot) as targets, or name another metric",
            )
        classes = outputs.shape[1]
        wrong = targets[(targets < 0) | (targets >= classes)]
        if wrong.numel():
            raise DataError(
                "QAT113",
                "targets",
                f"{wrong.numel()} of {targets.numel()} labels of the batch are out of range, the first is "
                f"{int(wrong[0])}; the model has {classes} classes, so labels are 0 to {classes - 1}",
                "Correct the labels, or the number of classes in model.kwargs",
            )


@dataclass(frozen=True)
class Evaluation:
    """Value of a metric over ``images`` items."""

    value: float
    images: int


def make_metric(factory: str, kwargs: Mapping[str, Any]) -> Metric:
    """A fresh metric from its entry point; raises ConfigError QAT106 if the object is not a :class:`Metric`."""
    metric = call_entry(factory, kwargs, key="metric")
    if not isinstance(metric, Metric):
        lacking = [name for name in ("name", "higher_is_better", "update", "compute") if not hasattr(metric, name)]
        raise ConfigError(
            "QAT106",
            "metric.factory",
            f"{factory} gave an object without {', '.join(lacking)}",
            "Add them to its class",
        )
    return metric


def evaluate(
    forward: Callable[..., Any],
    batches: Iterable[tuple[tuple[Tensor, ...], Any]],
    metric: Metric,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Run ``forward(*inputs)`` over ``batches`` without gradients and return the value of ``metric``.

    The caller sets the model's mode and state. Raises StateError QAT156 for a fake-quant model in train mode or in
    another state than VALIDATION, TrainingError QAT168 if an output or the value is NaN, DataError QAT110 if there are
    no batches.
    """
    check = getattr(forward, "check_scorable", None)  # of a fake-quant model, whose state has a say
    if check is not None:
        check()
    images = 0
    with torch.no_grad():
        for number, (inputs, targets) in enumerate(batches):
            outputs = forward(*(tensor.to(device) for tensor in inputs))
            _refuse_nan(outputs, number)
            metric.update(outputs, targets.to(device) if isinstance(targets, Tensor) else targets)
            images += inputs[0].shape[0]
    if images == 0:
        raise DataError("QAT110", "evaluation", "got no batches", "Raise the number of images or batches")
    value = float(metric.compute())
    if not math.isfinite(value):
        raise TrainingError("QAT168", f"metric {metric.name}", f"is {value} over {images} items", _NAN_FIX)
    return Evaluation(value, images)


_NAN_FIX = "Check first that the float model is sound, then the data, then lower qat.lr or set qat.clip_grad_norm"


def _refuse_nan(outputs: Any, batch: int) -> None:
    if isinstance(outputs, Tensor):
        nans = int(torch.isnan(outputs).sum()) if outputs.is_floating_point() else 0
        if nans:
            raise TrainingError(
                "QAT168", f"model output batch {batch}", f"{nans} of {outputs.numel()} values are NaN", _NAN_FIX
            )
    elif isinstance(outputs, Mapping):
        _refuse_nan(tuple(outputs.values()), batch)
    elif isinstance(outputs, tuple | list):
        for output in outputs:
            _refuse_nan(output, batch)


def write_metrics(path: str | Path, stage: str, values: Mapping[str, float | int]) -> None:
    """Write ``{stage: values}`` as JSON: sorted keys, 6 significant digits, whole or not at all.

    Raises TrainingError QAT169 for NaN or infinity, naming the key, and TypeError for a value that is no number.
    """
    rounded: dict[str, float | int] = {}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{stage}.{key} is a {type(value).__name__}; metric files hold flat numbers")
        if not math.isfinite(value):
            raise TrainingError(
                "QAT169", f"{path} {stage}.{key}", f"is {value}; metrics must be finite", "Find where it became so"
            )
        rounded[key] = value if isinstance(value, int) else float(f"{value:.6g}")
    write_json(path, {stage: rounded})


def ratio(stage_value: float, float_value: float, higher_is_better: bool) -> float:
    """How much of the float model's metric a stage keeps: stage/float, or float/stage where lower is better.

    1 is no loss. Raises DataError QAT115 where that means nothing: a negative value, or division by 0.
    """
    above, below = (stage_value, float_value) if higher_is_better else (float_value, stage_value)
    if stage_value == float_value:
        return 1.0
    if below <= 0 or above < 0:
        raise DataError(
            "QAT115",
            "metric ratio",
            f"of stage {stage_value:g} and float {float_value:g} is undefined",
            "Use a metric that is positive for a model that works, and check the float model",
        )
    return above / below
