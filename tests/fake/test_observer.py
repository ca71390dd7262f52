"""The streaming histogram, and the thresholds of every method against brute force in NumPy."""

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
from qatlib.fake.observer import SAMPLED, Histogram
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import METHODS, FakeQuantSpec, Method, QConfig
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
    "one outlier": [torch.cat([torch.randn(59999, generator=torch.Generator().manual_seed(4)), torch.tensor([80.0])])],
    "negative only": [-torch.rand(700, generator=torch.Generator().manual_seed(5))],
    "mixed shapes": _mixed(6),
    "single value": [torch.tensor([-0.75])],
    "relu": [torch.randn(5000, generator=torch.Generator().manual_seed(9)).clamp(min=0)],
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


def test_a_percentile_is_a_share_of_the_largest_value() -> None:
    """Multiples of a bin of 2^k are small whole numbers to each other: their ratios make many halves."""
    histogram, magnitudes = seen([torch.randn(4000, generator=torch.Generator().manual_seed(3)) ** 3])
    share = histogram.threshold(FakeQuantSpec(method="percentile", percentile=99.0)) / magnitudes[-1]
    used = math.floor(magnitudes[-1] / (histogram.limit / BINS)) + 1
    assert share < 0.95
    assert used * share == pytest.approx(round(used * share), abs=1e-6)


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
    assert histogram.threshold(FakeQuantSpec(method="mse")) < 70
    assert histogram.threshold(FakeQuantSpec(method="min_max")) == 80


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("name", ["normal", "heavy tails", "growing range", "one outlier", "mixed shapes"])
def test_errors_are_those_of_values_spread_over_their_bins(name: str, dtype: str) -> None:
    histogram, magnitudes = seen(DATA[name])
    thresholds = [float(magnitudes[-1]) * share for share in (1.0, 0.7, 0.3, 0.05)]
    found = histogram.magnitudes("a test").errors(thresholds, dtype).numpy()
    width, points = histogram.limit / BINS, 4001
    inside = (np.arange(points) + 0.5) / points * width
    counts = histogram.counts.numpy()
    for threshold, error in zip(thresholds, found, strict=True):
        parts = [
            count * squared_error(k * width + inside, threshold, dtype) / points
            for k, count in enumerate(counts)
            if count
        ]
        assert error == pytest.approx(math.fsum(parts) / counts.sum(), rel=2e-3)


def covering(magnitudes: NDArray[np.float64], percentile: float) -> float:
    rank = math.ceil(len(magnitudes) * Fraction(str(percentile)) / 100)
    return float(magnitudes[max(1, rank) - 1])


@pytest.mark.parametrize("name", ["normal", "heavy tails", "growing range", "one outlier", "mixed shapes", "constant"])
def test_mix_has_the_least_error_of_its_percentiles(name: str) -> None:
    histogram, magnitudes = seen(DATA[name])
    width = histogram.limit / BINS
    candidates = [covering(magnitudes, p) for p in (99.9, 99.95, 99.99, 99.995, 99.999, 100)]
    found = histogram.threshold(FakeQuantSpec(method="mix"))
    assert min(abs(found - c) for c in candidates) <= width
    least = min(squared_error(magnitudes, c, "int8") for c in candidates)
    assert squared_error(magnitudes, found, "int8") <= 1.03 * least + len(magnitudes) * width**2


def divergence(counts: NDArray[np.float64], kept: int, levels: int) -> float:
    """Divergence of ``kept`` bins in ``levels`` groups from what was seen, bin by bin as in TensorRT's calibration."""
    seen, stored = counts[:kept].copy(), np.zeros(kept)
    seen[-1] += counts[kept:].sum()
    for level in range(levels):
        group = [j for j in range(kept) if j * levels // kept == level]
        filled = [j for j in group if counts[j] > 0]
        for j in filled:
            stored[j] = counts[group].sum() / len(filled)
    if stored.sum() == 0 or np.any((seen > 0) & (stored == 0)):
        return math.inf
    p, q = seen / seen.sum(), stored / stored.sum()
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("name", ["normal", "heavy tails", "growing range", "one outlier", "mixed shapes", "relu"])
def test_kl_has_the_least_divergence(name: str) -> None:
    histogram, magnitudes = seen(DATA[name])
    found = histogram.threshold(FakeQuantSpec(method="kl"))
    used = math.floor(magnitudes[-1] / (histogram.limit / BINS)) + 1
    joined = used // 512
    counts = np.zeros(-(-used // joined) * joined)
    counts[:used] = histogram.counts.numpy()[:used]
    counts = counts.reshape(-1, joined).sum(1)
    counts[0] = min(counts[:2])
    assert 512 <= len(counts) <= 768
    candidates = range(128, len(counts) + 1, 7)  # every seventh: the loops are slow
    kept = round(found / magnitudes[-1] * len(counts))
    assert found == pytest.approx(magnitudes[-1] * kept / len(counts))
    assert divergence(counts, kept, 128) <= min(divergence(counts, i, 128) for i in candidates) + 1e-12


def test_kl_of_a_constant_is_the_constant() -> None:
    assert seen(DATA["constant"])[0].threshold(FakeQuantSpec(method="kl")) == 3.0
    assert seen(DATA["single value"])[0].threshold(FakeQuantSpec(method="kl")) == 0.75


def test_zeros_do_not_move_kl() -> None:
    values = torch.rand(3000, generator=torch.Generator().manual_seed(10)) + 0.001
    with_zeros, _ = seen([values, torch.zeros(60_000)])
    assert with_zeros.threshold(FakeQuantSpec(method="kl")) == seen([values])[0].threshold(FakeQuantSpec(method="kl"))


def test_kl_of_zeros_and_an_outlier_that_was_not_counted() -> None:
    x = torch.zeros(10 * SAMPLED + 1)
    x[1] = 5.0
    assert seen([x])[0].threshold(FakeQuantSpec(method="kl")) == 5.0


def test_kl_keeps_everything_where_there_are_more_codes_than_bins() -> None:
    histogram, magnitudes = seen(DATA["heavy tails"])
    assert histogram.threshold(FakeQuantSpec("int16", method="kl")) == magnitudes[-1]


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("batches", DATA.values(), ids=DATA.keys())
def test_auto_takes_the_method_with_the_least_error(batches: list[Tensor], dtype: Any) -> None:
    histogram, magnitudes = seen(batches)
    chosen = histogram.choose(FakeQuantSpec(dtype, method="auto", percentile=99.0))
    others = [histogram.choose(FakeQuantSpec(dtype, method=m, percentile=99.0)) for m in METHODS[:5]]
    assert chosen in others
    errors = [squared_error(magnitudes, other.threshold, dtype) for other in others]
    slack = len(magnitudes) * (histogram.limit / BINS) ** 2
    assert squared_error(magnitudes, chosen.threshold, dtype) <= 1.03 * min(errors) + slack


def test_auto_prefers_the_simpler_of_equal_methods() -> None:
    assert seen([torch.full((64,), 3.0)])[0].choose(FakeQuantSpec("int16", method="auto")).method == "min_max"


@pytest.mark.parametrize("method", METHODS[:6])
def test_zeros_give_zero(method: Method) -> None:
    histogram, _ = seen([torch.zeros(10), torch.zeros(3, 3)])
    assert histogram.threshold(FakeQuantSpec(method=method)) == 0.0


@pytest.mark.parametrize(("dtype", "scale"), [("int8", 1 / 128), ("int16", 0.5)])
def test_a_fixed_scale_is_kept_by_every_method(dtype: Any, scale: float) -> None:
    histogram, _ = seen(DATA["normal"])
    for method in METHODS:
        chosen = histogram.choose(FakeQuantSpec(dtype, method=method, scale=scale))
        assert (chosen.method, scale_of(chosen.threshold, dtype)) == ("fixed_scale", scale)


def test_extremes_alone_serve_min_max_and_nothing_else() -> None:
    histogram = Histogram.of(FakeQuantSpec(method="min_max"))
    histogram.update(torch.tensor([-3.0, 2.0]), "here")
    assert histogram.counts.numel() == 0
    assert histogram.threshold(FakeQuantSpec(method="min_max")) == 3.0
    with pytest.raises(TrainingError, match="QAT167 calibration: mse needs a histogram"):
        histogram.threshold(FakeQuantSpec(method="mse"))


def test_memory_does_not_grow() -> None:
    def stored(histogram: Histogram) -> list[tuple[str, int]]:
        return [(k, v.numel() if isinstance(v, Tensor) else 1) for k, v in sorted(vars(histogram).items())]

    few, _ = seen([torch.randn(10)])
    many, _ = seen([torch.randn(1000) * 2.0**k for k in range(40)])
    assert stored(few) == stored(many)
    assert few.counts.numel() == BINS
    assert int(many.counts.sum()) == 40_000


def contents(histogram: Histogram) -> tuple[float, float, float, list[int]]:
    return histogram.limit, histogram.low, histogram.high, histogram.counts.tolist()


@pytest.mark.parametrize("name", ["normal", "growing range", "shrinking range", "zeros first", "tiny", "mixed shapes"])
def test_neither_batches_nor_their_order_change_the_result(name: str) -> None:
    whole, _ = seen([torch.cat([b.flatten() for b in DATA[name]])])
    for batches in (DATA[name], DATA[name][::-1]):
        assert contents(seen([part for batch in batches for part in batch.flatten().split(97)])[0]) == contents(whole)


@pytest.mark.parametrize("bins", [128, 768, 2048])
@pytest.mark.parametrize("name", ["growing range", "shrinking range", "zeros first", "mixed shapes"])
def test_merged_histograms_are_that_of_all_data(name: str, bins: int) -> None:
    whole, parts = Histogram(bins), [Histogram(bins) for _ in range(3)]
    for number, batch in enumerate(DATA[name]):
        whole.update(batch, "here")
        parts[number % 3].update(batch, "here")
    merged = Histogram(bins)
    for part in parts:
        merged.merge(part)
    assert contents(merged) == contents(whole)
    assert merged.counts.dtype == torch.int64


def test_histograms_of_other_bins_do_not_merge() -> None:
    with pytest.raises(TrainingError, match="QAT167"):
        Histogram(128).merge(Histogram(256))
    with pytest.raises(TrainingError, match="QAT167"):
        Histogram(128).merge(Histogram(128, counting=False))


@pytest.mark.parametrize("shape", [(8, 96, 49, 49), (5, 3, 224, 224), (1, 1, 1031, 521), (65537,)])
def test_a_large_tensor_is_counted_by_a_sample_of_all_rows_and_columns(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[-1] = -5.0
    histogram = Histogram(BINS)
    histogram.update(x, "here")
    assert (histogram.low, histogram.high) == (-5.0, float(x.max()))
    assert histogram.counts.sum() == pytest.approx(x.numel(), rel=0.01)
    middle = histogram.threshold(FakeQuantSpec(method="percentile", percentile=50.0))
    assert middle == pytest.approx(0.5, abs=0.01)
    for axis, size in enumerate(shape):
        one = torch.zeros(shape)
        one.select(axis, size // 2).fill_(1.0)
        spread = Histogram(BINS)
        spread.update(one, "here")
        assert int(spread.counts[1:].sum()) == pytest.approx(x.numel() / size, rel=0.05, abs=2 * x.numel() / SAMPLED)


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
    assert caught.value.seen.endswith("in batch 0")


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
