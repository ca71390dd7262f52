"""Streaming statistics against NumPy on the whole data at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.analysis.pieces import Coded, OnGrid, pieces
from qatlib.analysis.stats import BINS, Comparison, RunningComparison, RunningSummary, check_finite
from qatlib.errors import TrainingError
from qatlib.qtype import FLOAT, QType

SEEDS = st.integers(0, 2**32 - 1)


def compare(reference: np.ndarray, other: np.ndarray, qtype: QType = FLOAT, parts: int = 1) -> Comparison:
    running = RunningComparison(qtype)
    for a, b in zip(np.array_split(reference, parts), np.array_split(other, parts), strict=True):
        running.add(torch.from_numpy(a), torch.from_numpy(b))
    result = running.result()
    assert result is not None
    return result


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = (rng.normal(3.0, 2.0, (12, 7)) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
    return reference, (reference + rng.normal(0, 0.1, reference.shape) * reference.std()).astype(np.float32)


@given(SEEDS, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_distances_equal_numpy_however_the_data_is_cut(seed: int, parts: int) -> None:
    reference, other = pair(seed)
    seen = compare(reference, other, parts=parts)
    a, b = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    assert seen.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
    assert seen.mse == pytest.approx(np.mean((a - b) ** 2), rel=1e-5)
    assert seen.l1 == pytest.approx(np.mean(np.abs(a - b)), rel=1e-5)
    assert seen.sqnr_db == pytest.approx(10 * np.log10(np.sum(a**2) / np.sum((a - b) ** 2)), rel=1e-5)
    assert seen.max_abs == pytest.approx(np.abs(a - b).max(), rel=1e-6)


@given(SEEDS, st.sampled_from(["int8", "int16"]), st.sampled_from([0, 1, 2, 60_000]))
@settings(max_examples=40, deadline=None)
def test_values_of_one_format_are_compared_by_their_codes(seed: int, dtype: str, apart: int) -> None:
    rng = np.random.default_rng(seed)
    scale = float(np.float32(10.0 ** rng.uniform(-6, 3)))
    qmin, qmax = (-128, 127) if dtype == "int8" else (-32768, 32767)
    codes = rng.integers(qmin, qmax, (2, 9, 50), endpoint=True)
    others = np.clip(codes + rng.integers(-apart, apart, codes.shape, endpoint=True), qmin, qmax)
    qtype = QType(dtype, scale)  # type: ignore[arg-type]
    running, left, right = RunningComparison(qtype), RunningSummary(), RunningSummary()
    reference = torch.from_numpy(codes.astype(np.float32)) * scale
    for ref, oth in pieces(qtype, OnGrid(reference, scale), Coded(torch.from_numpy(others).float(), scale)):
        left.add_piece(ref)
        running.add_pieces(ref, oth)
        right.add_piece(oth)
    seen = running.result()
    assert seen is not None
    a, b = codes.ravel() * scale, others.ravel() * scale
    assert seen.differing == np.count_nonzero(codes != others)
    assert seen.above_1_lsb == np.count_nonzero(np.abs(codes - others) > 1)
    assert seen.saturated == 0
    assert seen.max_abs == pytest.approx(np.abs(a - b).max(), rel=1e-12)
    assert seen.l1 == pytest.approx(np.mean(np.abs(a - b)), rel=1e-6)
    assert seen.mse == pytest.approx(np.mean((a - b) ** 2), rel=1e-5)
    assert seen.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    for summary, x in ((left.result(), a), (right.result(), b)):
        assert summary is not None
        assert (summary.min, summary.max) == pytest.approx((x.min(), x.max()), rel=1e-12)
        assert summary.mean == pytest.approx(x.mean(), abs=1e-5 * np.abs(x).max())
        assert summary.var == pytest.approx(x.var(), rel=1e-4)
    assert seen.histograms is not None
    for row, x in zip(seen.histograms, (codes, others), strict=True):
        expected, _ = np.histogram(x, np.linspace(qmin, qmax + 1, BINS + 1))
        np.testing.assert_array_equal(row, expected)


@given(SEEDS, st.integers(1, 5), st.sampled_from(["int8", "int16"]))
@settings(max_examples=30, deadline=None)
def test_code_counts_and_kl_equal_numpy(seed: int, parts: int, dtype: str) -> None:
    reference, other = pair(seed)
    scale = np.float32(np.abs(reference).max() / (100 if dtype == "int8" else 30000))
    seen = compare(reference, other, QType(dtype, float(scale)), parts)  # type: ignore[arg-type]
    qmin, qmax = (-128, 127) if dtype == "int8" else (-32768, 32767)
    raw = np.rint(reference / scale)
    a, b = np.clip(raw, qmin, qmax).astype(int), np.clip(np.rint(other / scale), qmin, qmax).astype(int)
    assert seen.differing == np.count_nonzero(a != b)
    assert seen.above_1_lsb == np.count_nonzero(np.abs(a - b) > 1)
    assert seen.saturated == np.count_nonzero((raw < qmin) | (raw > qmax))
    edges = np.linspace(qmin, qmax + 1, BINS + 1)
    histograms = [np.histogram(codes, edges)[0] for codes in (a, b)]
    assert seen.histograms == tuple(tuple(row) for row in histograms)
    p, q = (row + 0.5 for row in histograms)
    p, q = p / p.sum(), q / q.sum()
    assert seen.kl == pytest.approx(float(np.sum(p * np.log(p / q))), abs=1e-12)
    assert seen.max_lsb == pytest.approx(np.abs(reference.astype(float) - other).max() / scale)


@given(SEEDS, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_summary_equals_numpy(seed: int, parts: int) -> None:
    values, _ = pair(seed)
    values += 1e4
    running = RunningSummary()
    for part in np.array_split(values, parts):
        running.add(torch.from_numpy(part))
    seen = running.result()
    assert seen is not None
    exact = values.astype(np.float64)
    assert (seen.count, seen.min, seen.max) == (exact.size, exact.min(), exact.max())
    assert seen.mean == pytest.approx(exact.mean(), rel=1e-7)
    assert seen.var == pytest.approx(exact.var(), rel=1e-4)


def test_zero_tensor_has_cosine_zero_and_identical_ones_infinite_sqnr() -> None:
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert compare(zero, one).cosine == 0.0
    assert compare(zero, one).sqnr_db == -math.inf
    assert compare(zero, zero).cosine == 0.0
    assert compare(one, one).cosine == 1.0
    assert compare(one, one).sqnr_db == math.inf


def test_nothing_seen_gives_no_result() -> None:
    assert RunningSummary().result() is None
    assert RunningComparison(FLOAT).result() is None


def test_user_measure_is_averaged_by_element_count() -> None:
    running = RunningComparison(FLOAT, lambda a, b: float(a.numel()))
    running.add(torch.zeros(1), torch.zeros(1))
    running.add(torch.zeros(3), torch.zeros(3))
    result = running.result()
    assert result is not None
    assert result.custom == (1 * 1 + 3 * 3) / 4


def test_nan_is_an_error_with_place_and_count() -> None:
    with pytest.raises(TrainingError, match=r"^QAT165 layer: 2 of 3 output elements") as caught:
        check_finite(torch.tensor([1.0, math.nan, math.inf]), "layer")
    assert caught.value.code == "QAT165"


def test_the_order_of_memory_changes_nothing() -> None:
    reference, other = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 3)
    plain, mixed = RunningComparison(QType("int8", 0.1)), RunningComparison(QType("int8", 0.1))
    plain.add(reference, other)
    mixed.add(reference, other.to(memory_format=torch.channels_last))
    first, second = plain.result(), mixed.result()
    assert first is not None
    assert second is not None
    assert (first.differing, first.histograms) == (second.differing, second.histograms)
    assert first.se == pytest.approx(second.se, rel=1e-6)


def test_histograms_of_large_tensors_are_those_of_a_sample_that_leaves_no_channel_out() -> None:
    channels = torch.arange(64.0).repeat(2**14)  # channels last: one value a channel, 64 divides the step
    seen = RunningComparison(QType("int8", 1.0))
    seen.add(channels, channels)
    result = seen.result()
    assert result is not None
    assert result.histograms is not None
    counts = np.array(result.histograms[0])
    assert counts.sum() == channels.numel()
    assert (counts[128:192] > 0).sum() >= 32


def test_numbers_whose_squares_float32_cannot_hold() -> None:
    for magnitude in (1e-25, 1e25):
        reference = torch.randn(100) * magnitude
        other = reference * 1.5
        seen = compare(reference.numpy(), other.numpy())
        assert seen.sqnr_db == pytest.approx(10 * math.log10(4), rel=1e-5)
        assert seen.cosine == pytest.approx(1.0)
