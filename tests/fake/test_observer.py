"""Thresholds of every method against brute force in NumPy on the data itself."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatlib.errors import TrainingError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.observer import Histogram
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.qtype import scale_of
from tests.models import images, model

BINS = 2048


def _mixed(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 50, generator=g), torch.randn(300, generator=g).exp(), -torch.rand(1000, generator=g)]


DATA: dict[str, list[Tensor]] = {
    "normal": [torch.randn(5000, generator=torch.Generator().manual_seed(0))],
    "heavy tails": [torch.randn(4000, generator=torch.Generator().manual_seed(1)).pow(3)],
    "batches of one range": list(torch.randn(10, 500, generator=torch.Generator().manual_seed(2))),
    "growing range": [torch.randn(500, generator=torch.Generator().manual_seed(k)) * 1.7**k for k in range(12)],
    "shrinking range": [torch.randn(500, generator=torch.Generator().manual_seed(k)) * 0.5**k for k in range(6)],
    "zeros first": [torch.zeros(100), torch.randn(3000, generator=torch.Generator().manual_seed(3))],
    "one outlier": [torch.cat([torch.randn(99999, generator=torch.Generator().manual_seed(4)), torch.tensor([80.0])])],
    "negative only": [-torch.rand(700, generator=torch.Generator().manual_seed(5))],
    "mixed shapes": _mixed(6),
    "single value": [torch.tensor([-0.75])],
    "constant": [torch.full((64,), 3.0)],
    "tiny": [torch.randn(300, generator=torch.Generator().manual_seed(7)) * 1e-33],
}


def seen(batches: list[Tensor]) -> tuple[Histogram, NDArray[np.float64]]:
    histogram = Histogram(BINS)
    for batch in batches:
        histogram.update(batch, "here")
    return histogram, np.sort(np.abs(torch.cat([b.flatten() for b in batches]).double().numpy()))


@pytest.mark.parametrize("batches", DATA.values(), ids=DATA.keys())
def test_min_max_is_the_largest_magnitude(batches: list[Tensor]) -> None:
    histogram, magnitudes = seen(batches)
    assert histogram.threshold(FakeQuantSpec(method="min_max")) == magnitudes[-1]
    assert int(histogram.counts.sum()) == len(magnitudes)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("batches", DATA.values(), ids=DATA.keys())
def test_percentile_covers_that_share_within_one_bin(batches: list[Tensor], percentile: float) -> None:
    histogram, magnitudes = seen(batches)
    rank = math.ceil(len(magnitudes) * Fraction(str(percentile)) / 100)
    exact, width = magnitudes[max(1, rank) - 1], histogram.limit / BINS
    found = histogram.threshold(FakeQuantSpec(method="percentile", percentile=percentile))
    assert exact - width <= found <= min(exact + width, magnitudes[-1]) * (1 + 1e-6)


def squared_error(magnitudes: NDArray[np.float64], threshold: float, dtype: str) -> float:
    scale = scale_of(threshold, dtype)
    codes = np.clip(np.rint(magnitudes / scale), 0, {"int8": 127, "int16": 32767}[dtype])
    return float(np.square(magnitudes - codes * scale).sum())


@pytest.mark.parametrize("batches", [v for k, v in DATA.items() if k != "tiny"], ids=[k for k in DATA if k != "tiny"])
def test_mse_has_the_least_error_of_a_hundred_fractions(batches: list[Tensor]) -> None:
    histogram, magnitudes = seen(batches)
    found = histogram.threshold(FakeQuantSpec(method="mse"))
    errors = {k: squared_error(magnitudes, magnitudes[-1] * k / 100, "int8") for k in range(1, 101)}
    fraction = found / magnitudes[-1] * 100
    assert fraction == pytest.approx(round(fraction), abs=1e-6)
    assert errors[round(fraction)] <= 1.03 * min(errors.values()) + len(magnitudes) * (histogram.limit / BINS) ** 2


def test_mse_clips_an_outlier_that_min_max_keeps() -> None:
    histogram, _ = seen(DATA["one outlier"])
    assert histogram.threshold(FakeQuantSpec(method="mse")) < 60
    assert histogram.threshold(FakeQuantSpec(method="min_max")) == 80


@pytest.mark.parametrize("method", ["min_max", "percentile", "mse"])
def test_zeros_give_zero(method: Any) -> None:
    histogram, _ = seen([torch.zeros(10), torch.zeros(3, 3)])
    assert histogram.threshold(FakeQuantSpec(method=method)) == 0.0


def test_memory_does_not_grow() -> None:
    def stored(histogram: Histogram) -> list[tuple[str, int]]:
        return [(k, v.numel() if isinstance(v, Tensor) else 1) for k, v in sorted(vars(histogram).items())]

    few, _ = seen([torch.randn(10)])
    many, _ = seen([torch.randn(1000) * 2.0**k for k in range(40)])
    assert stored(few) == stored(many)
    assert few.counts.numel() == BINS


def test_batches_do_not_change_the_result() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(8))
    x[0] = 9.0
    whole, _ = seen([x])
    parts, _ = seen(list(x.split(100)))
    assert torch.equal(whole.counts, parts.counts)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_the_module(bad: float) -> None:
    prepared = prepare_qat_fx(
        model(lambda s, x: s.d(s.c(x)), c=torch.nn.Conv2d(3, 4, 1), d=torch.nn.Conv2d(4, 2, 1)),
        example_inputs=[images(1)],
    )
    with torch.no_grad():
        prepared.op("c").bias[1] = bad
    with pytest.raises(TrainingError, match="QAT160") as caught:
        calibrate(prepared, [images(2, size=4)])
    assert caught.value.where == "c"
    assert "32 non-finite of 128" in caught.value.seen


def test_an_output_in_high_precision_is_checked_too() -> None:
    prepared = prepare_qat_fx(model(lambda s, x: s.d(x), d=torch.nn.Conv2d(3, 2, 1)), example_inputs=[images(1)])
    with torch.no_grad():
        prepared.op("d").bias[0] = math.nan
    with pytest.raises(TrainingError, match="QAT160 d:"):
        calibrate(prepared, [images(2)])


def test_a_range_too_small_for_a_float32_scale_counts_as_0() -> None:
    prepared = prepare_qat_fx(model(lambda s, x: s.d(x), d=torch.nn.Conv2d(3, 2, 1)), example_inputs=[images(1)])
    calibrate(prepared, [images(2) * 1e-42])
    assert prepared.qtype("x.quant").scale == 2.0**-24


def test_calibrating_again_forgets_the_earlier_data() -> None:
    prepared = prepare_qat_fx(
        model(lambda s, x: s.d(x), d=torch.nn.Conv2d(3, 2, 1)), QConfig(FakeQuantSpec(method="min_max")),
        example_inputs=[images(1)],
    )  # fmt: skip
    calibrate(prepared, [images(2) * 100])
    calibrate(prepared, [images(2)])
    assert prepared.qtype("x.quant").scale == scale_of(float(images(2).abs().max()), "int8")
