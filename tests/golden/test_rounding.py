"""Rules and values before rounding, on numbers small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qatlib.golden.rounding import RULES, Unrounded
from tests.golden.planting import Array

HALVES = np.array([-1.5, -1.25, -0.5, 0.0, 0.5, 1.25, 1.5, 2.5])
ROUNDED = {
    "half away from zero": [-2, -1, -1, 0, 1, 1, 2, 3],
    "half up": [-1, -1, 0, 0, 1, 1, 2, 3],
    "half towards zero": [-1, -1, 0, 0, 0, 1, 1, 2],
    "floor (arithmetic shift)": [-2, -2, -1, 0, 0, 1, 1, 2],
    "towards zero (truncation)": [-1, -1, 0, 0, 0, 1, 1, 2],
}


@pytest.mark.parametrize("rule", RULES)
def test_halves(rule: str) -> None:
    assert RULES[rule](HALVES).tolist() == ROUNDED[rule]


def test_a_number_just_below_a_half_of_53_bits_is_not_rounded_up() -> None:
    """Adding a half to it in float64 gives the next integer."""
    below = np.array([np.nextafter(2.0**51 + 0.5, 0.0), np.nextafter(0.5, 0.0)])
    assert RULES["half up"](below).tolist() == [2.0**51, 0.0]


def _sums(*terms: float) -> Unrounded:
    return Unrounded((np.array(terms),), (np.array([2.0**-24]),), -128, 127, sums=True)


@pytest.mark.parametrize(
    ("bits", "wraps", "codes"),
    [(32, False, [127, 16, -128]), (32, True, [-128, 16, 127]), (24, False, [0, 0, 0]), (24, True, [0, 0, 0])],
)
def test_accumulators_that_are_too_narrow(bits: int, wraps: bool, codes: list[int]) -> None:
    step = _sums(2.0**31, 2.0**28, -(2.0**31) - 1)
    assert step.codes().tolist() == [127, 16, -128]
    assert step.narrowed(bits, wraps).tolist() == codes


def test_the_interval_of_a_factor() -> None:
    real = np.array([[10.0, -4.0, 0.0], [3.0, 7.0, 1.0]])
    step = Unrounded((real,), (np.array([[1.0], [1.0]]),), -128, 127)

    def interval(codes: Array, axes: tuple[int, ...]) -> list[float]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.concatenate([end.ravel() for end in step.factors_within(codes, axes)]).tolist()

    doubled = 2 * real
    assert interval(doubled, (0, 1)) == [max(19.5 / 10, 13.5 / 7), min(20.5 / 10, 14.5 / 7)]
    assert interval(doubled, (1,)) == [1.95, 13.5 / 7, 2.05, 14.5 / 7]
    least, most = interval(np.where(real == 0, 1, doubled), (0, 1))
    assert least > most
    step = Unrounded((real,), (np.ones(1),), -8, 15)
    assert interval(np.clip(doubled, -8, 15), (0, 1)) == [13.5 / 7, 14.5 / 7]
