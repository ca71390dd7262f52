"""Calibration: show data to the observers, then set every scale."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qatlib.errors import DataError, TrainingError
from qatlib.fake.distributed import gather, size, summed
from qatlib.fake.fake_quant import ConstantFakeQuantize, FakeQuantize
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.observer import Histogram
from qatlib.fake.qconfig import Method, method_for
from qatlib.fake.state import FakeQuantState

_BATCH = "Give a tensor, a dict by the names of the inputs, or a tuple whose first entries are the inputs"


def calibrate(
    model: FakeQuantModel, dataloader: Iterable[Any], device: str | torch.device = "cpu", histograms: bool = False
) -> int:
    """Set the scales of ``model``, those of activations from all batches of ``dataloader``.

    A batch is a tensor, a dict of the model's inputs by name, or a tuple whose first entries are the inputs (one tuple
    of inputs is fine too). With
    ``histograms`` what every method needs is kept, and :func:`settle` compares methods without more data. Returns the
    number of samples; leaves the model in eval mode and VALIDATION state. Memory does not depend on the number of
    batches. Of several processes under torch.distributed each gets some batches; all get the scales of all of them.

    Raises DataError for an empty loader (QAT110), a batch of something else (QAT111), NaN in an input (QAT112), and
    TrainingError (QAT160) at the first operator whose output is not finite.
    """
    model.to(device).eval()
    for _, op in model.ops():
        op.forget()
        if op.weight_fake_quant is not None:
            op.weight_fake_quant.settle(op.float_params()["weight"])
    for _, fake in quantizers(model):
        fake.forget(histograms)
    samples = int(summed(_show(model, dataloader, device, "calibration")))
    _check_any(samples, "calibration")
    _merge_observers(model)
    settle(model)
    return samples


def settle(model: FakeQuantModel, method: Method | None = None, percentile: float | None = None) -> None:
    """Turn what the observers saw into scales, and enter VALIDATION.

    ``method`` and ``percentile`` take the place of those of every QConfig, but for scales that are fixed; 16 bits have
    the extremes instead of a percentile. Raises TrainingError (QAT167) for a method whose histograms were not kept,
    QConfigError (QAT142) for one that is none.
    """
    for _, fake in quantizers(model):
        spec = fake.spec
        if spec.scale is None:
            kept = spec.percentile if percentile is None else percentile
            spec = replace(spec, method=method_for(spec.dtype, method) if method else spec.method, percentile=kept)
        fake.settle(spec)
    set_fake_quantize(model, FakeQuantState.VALIDATION)


def ranges_on(
    model: FakeQuantModel, dataloader: Iterable[Any], device: str | torch.device = "cpu"
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every calibrated activation on other data, as calibration would see them.

    Nothing of ``model`` changes. Raises as :func:`calibrate`.
    """
    probe = copy.deepcopy(model)
    fakes = dict(quantizers(probe))
    for fake in fakes.values():
        fake.histogram = Histogram(fake.spec.bins, counting=False)
    _check_any(_show(probe, dataloader, device, "held-out data"), "held-out data")
    seen = {name: fake.histogram for name, fake in fakes.items()}
    return {name: (h.low, h.high) for name, h in seen.items() if h.low <= h.high}


def quantizers(model: FakeQuantModel) -> Iterator[tuple[str, FakeQuantize]]:
    """Every activation whose scale calibration sets, by the name of its op."""
    for name, op in model.ops():
        fake = op.activation_post_process
        if fake is not None and not isinstance(fake, ConstantFakeQuantize):
            yield name, fake


def _show(model: FakeQuantModel, dataloader: Iterable[Any], device: str | torch.device, title: str) -> int:
    """Run all batches in CALIBRATION state; the number of samples."""
    set_fake_quantize(model, FakeQuantState.CALIBRATION)
    samples = 0
    with torch.no_grad():
        for number, batch in enumerate(dataloader):
            inputs = inputs_of(batch, model.graph.inputs)
            _check_inputs(inputs, model.graph.inputs, f"{title} batch {number}")
            try:
                check_finite(model, model(*(x.to(device) for x in inputs)))
            except TrainingError as error:
                seen = f"{error.seen}, in batch {number}"
                raise TrainingError(error.code, error.where, seen, error.fix) from None
            samples += inputs[0].shape[0]
    return samples


def _check_any(samples: int, title: str) -> None:
    if not samples:
        raise DataError("QAT110", title, "the loader gave no batch", "Check the split and its size")


def _merge_observers(model: FakeQuantModel) -> None:
    """Give the observers of every process what those of all of them saw: counts and extremes, so to the bit."""
    if size() == 1:
        return
    everywhere = gather({name: fake.histogram for name, fake in quantizers(model)})
    for name, fake in quantizers(model):
        fake.histogram = Histogram.of(fake.spec, fake.histogram.counting)
        for seen in everywhere:
            fake.histogram.merge(seen[name])
    for _, op in model.ops():
        op.merge()


def _check_inputs(inputs: tuple[Any, ...], names: Iterable[str], where: str) -> None:
    for name, x in zip(names, inputs, strict=False):
        if not isinstance(x, Tensor):
            raise DataError(
                "QAT111",
                f"{where} input {name}",
                f"is a {type(x).__name__}, not a tensor",
                _BATCH,
            )
        bad = int(torch.isnan(x).sum()) if x.is_floating_point() else 0
        if bad:
            raise DataError(
                "QAT112", f"{where} input {name}", f"holds {bad} NaN of {x.numel()} values", "Correct or drop the items"
            )


def check_finite(model: FakeQuantModel, outputs: Any) -> None:
    """Raise TrainingError (QAT160) for an output that is not finite; outputs in high precision have no observer."""
    for name, out in zip(model.graph.outputs, tree_leaves(outputs), strict=True):
        bad = int((~torch.isfinite(out)).sum())
        if bad:
            raise TrainingError(
                "QAT160",
                name,
                f"output holds {bad} non-finite of {out.numel()} elements",
                "Check the float model and the data with float-check",
            )


def inputs_of(batch: Any, names: Sequence[str]) -> tuple[Tensor, ...]:
    """The model's input tensors of a batch, ``names`` in order; raises DataError (QAT111) for what is no batch."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        if absent := [name for name in names if name not in batch]:
            raise DataError("QAT111", "batch", f"has {', '.join(map(str, batch))} but not {absent[0]}", _BATCH)
        return tuple(batch[name] for name in names)
    if not isinstance(batch, tuple | list) or not batch:
        size = " of nothing" if isinstance(batch, tuple | list) else ""
        raise DataError("QAT111", "batch", f"is a {type(batch).__name__}{size}", _BATCH)
    first = batch[0]
    return tuple(first) if isinstance(first, tuple | list) else tuple(batch[: len(names)])
