"""The integer program against all choices there are."""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import sys
from itertools import pairwise

import pytest
import scipy.optimize

from qatlib.errors import ConfigError
from qatlib.tune.front import Choices, non_dominated
from qatlib.tune.space import Option

OPTIONS = (Option("int8"), Option("int16"), Option("int32"))
Tables = tuple[dict[str, dict[Option, float]], dict[str, dict[Option, float]]]


def tables(seed: int, units: int = 6) -> Tables:
    """Noises over six decades; latencies that may fall; some options are not to be had."""
    dice = random.Random(seed)
    noises, latencies = {}, {}
    for k in range(units):
        noise = 10 ** dice.uniform(-5, 1)
        noises[f"u{k}"] = {OPTIONS[0]: noise, OPTIONS[1]: noise * 2**-16, OPTIONS[2]: noise / 3}
        found = {OPTIONS[0]: 0.0, OPTIONS[1]: dice.uniform(0.1, 4), OPTIONS[2]: dice.uniform(-0.5, 2)}
        latencies[f"u{k}"] = {option: us for option, us in found.items() if not (k == 2 and option == OPTIONS[1])}
    return noises, latencies


def every(
    noises: dict[str, dict[Option, float]], latencies: dict[str, dict[Option, float]]
) -> list[tuple[float, float]]:
    """(noise, latency) of every choice."""
    units = list(noises)
    return [
        (
            sum(noises[u][o] for u, o in zip(units, taken, strict=True)),
            sum(latencies[u][o] for u, o in zip(units, taken, strict=True)),
        )
        for taken in itertools.product(*(latencies[u] for u in units))
    ]


def test_what_the_solver_prints_is_not_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS writes through C, which keeps a line until its buffer is full."""
    solve, puts = scipy.optimize.milp, ctypes.CDLL(None).puts

    def loud(*arguments: object, **options: object) -> object:
        puts(b"HighsMipSolverData::transform")
        return solve(*arguments, **options)

    monkeypatch.setattr(scipy.optimize, "milp", loud)
    puts(b"before")
    assert Choices(*tables(0), 100.0, 0.0).front(3)
    puts(b"after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("seed", range(8))
def test_each_point_is_the_fastest_of_all_choices_that_are_as_good(seed: int) -> None:
    noises, latencies = tables(seed)
    choices = every(noises, latencies)
    front = Choices(noises, latencies, 100.0, 1e-7).front(12)
    assert len(front) > 2
    for point in front:
        noise = sum(noises[u][point.choice.get(u, OPTIONS[0])] for u in noises)
        assert point.noise == pytest.approx(noise + 1e-7)
        fastest = min(us for other, us in choices if other <= noise * (1 + 1e-9))
        assert point.latency_us - 100.0 == pytest.approx(fastest, abs=1e-6)
    assert front[0].latency_us - 100.0 == pytest.approx(min(us for _, us in choices))
    assert front[-1].noise - 1e-7 == pytest.approx(min(noise for noise, _ in choices))


@pytest.mark.parametrize("seed", range(8))
def test_the_front_is_monotone_and_nothing_of_it_is_dominated(seed: int) -> None:
    front = Choices(*tables(seed), 10.0, 0.0).front(16)
    for faster, slower in pairwise(front):
        assert faster.latency_us < slower.latency_us
        assert faster.noise > slower.noise
    assert non_dominated(list(reversed(front))) == front


def test_a_bound_between_two_points() -> None:
    noises, latencies = tables(1)
    choices = Choices(noises, latencies, 0.0, 0.5)
    bound = math.sqrt(min(x for x, _ in every(noises, latencies)))
    point = choices.fastest_within(bound + 0.5)
    assert point is not None
    assert point.noise <= bound + 0.5 + 1e-9
    assert point.latency_us == pytest.approx(min(us for x, us in every(noises, latencies) if x <= bound), abs=1e-6)
    assert choices.fastest_within(0.5) is None, "the rest alone is as much"


def test_one_unit_with_nothing_to_gain_gives_one_point() -> None:
    noises = {"u": {OPTIONS[0]: 0.0, OPTIONS[1]: 0.0}}
    (point,) = Choices(noises, {"u": {OPTIONS[0]: 0.0, OPTIONS[1]: 1.0}}, 5.0, 0.0).front(8)
    assert (point.choice, point.latency_us, point.sqnr_db) == ({}, 5.0, math.inf)


def test_without_scipy_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"^QAT256 .*pip install 'qatlib\[tune\]'"):
        Choices(*tables(0), 0.0, 0.0)
