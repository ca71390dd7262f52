"""Which choices are worth trying: an exact integer program per bound on the predicted loss."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qatlib.errors import ConfigError
from qatlib.tune.space import HIGH, Choice, Option

WIDER = 2.0**-16
"""Of the power of rounding errors at 8 bits, what is left at 16: a code is a 256th."""
_SLACK = 1e-9

Part = Literal["all", "weight", "activation"]
"""What of a unit is rounded."""
Table = Mapping[str, Mapping[Option, float]]
"""A number for every option of every unit."""
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A choice with its predicted ``noise`` (error power at the outputs over that of the outputs) and latency in µs."""

    choice: Choice
    noise: float
    latency_us: float

    @property
    def sqnr_db(self) -> float:
        return -10.0 * math.log10(self.noise) if self.noise > 0 else math.inf


def losses(
    noises: Mapping[str, Mapping[Part, float]], options: Mapping[str, Sequence[Option]]
) -> dict[str, dict[Option, float]]:
    """Noise that each unit in ``noises`` adds at the outputs, by option: what rounding it alone was measured to do.

    16 bits leave :data:`WIDER` of what 8 bits do; an output in high precision adds nothing. Noise powers of units add
    up as long as errors are small and independent.
    """
    found: dict[str, dict[Option, float]] = {}
    for name, possible in options.items():
        if (seen := noises.get(name)) is None:
            continue
        if "all" in seen:  # it has one of the two
            only_weight = not any(option.activation for option in possible)
            of_weight, of_output = (seen["all"], 0.0) if only_weight else (0.0, seen["all"])
        else:
            of_weight, of_output = seen["weight"], seen["activation"]
        found[name] = {
            option: of_weight * (WIDER if option.weight == "int16" else 1.0)
            + of_output * {"int16": WIDER, HIGH: 0.0}.get(option.activation, 1.0)
            for option in possible
        }
    return found


class Choices:
    """All choices that there are, each with its predicted noise and latency.

    ``latencies`` are µs beside ``base_us``, that of the narrowest choice; an option that is not in them cannot be
    taken. ``rest`` is the noise of what has no option. Raises ConfigError QAT256 if SciPy is not installed.
    """

    def __init__(self, noises: Table, latencies: Table, base_us: float, rest: float) -> None:
        self._problem, self._base_us, self._rest = _Problem(noises, latencies), base_us, rest

    def front(self, count: int) -> tuple[Point, ...]:
        """Choices of which none is beaten in both, fastest first: of each of ``count`` bounds on the loss the fastest.

        Bounds lie in equal ratios between the least noise that is possible and that of the fastest choice.
        """
        problem = self._problem
        fastest, best = problem.solve(math.inf), problem.least_noise()
        high, low = (problem.total(problem.noise, x) for x in (fastest, best))
        floor = max(low, high * 1e-9)
        bounds = [low] if count < 2 or high <= floor else [max(b, low) for b in np.geomspace(high, floor, count)]
        return non_dominated([self._point(fastest), *(self._point(problem.solve(bound)) for bound in bounds)])

    def fastest_within(self, noise: float) -> Point | None:
        """The fastest choice with at most that noise in all, None if there is none."""
        problem, bound = self._problem, noise - self._rest
        if bound < problem.total(problem.noise, problem.least_noise()):
            return None
        return self._point(problem.solve(bound))

    def _point(self, x: Vector) -> Point:
        problem = self._problem
        noise, latency = (problem.total(table, x) for table in (problem.noise, problem.latency))
        return Point(problem.choice(x), noise + self._rest, latency + self._base_us)


def non_dominated(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points that no other beats in noise and latency, fastest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.latency_us, p.noise, len(p.choice))):
        if not kept or point.noise < kept[-1].noise:
            kept.append(point)
    assert all(a.latency_us <= b.latency_us for a, b in pairwise(kept))
    return tuple(kept)


class _Problem:
    """One binary variable per option, of which each unit takes one."""

    def __init__(self, noises: Table, latencies: Table) -> None:
        try:
            import scipy.optimize
        except ImportError:
            raise ConfigError(
                "QAT256", "qatlib tune", "needs SciPy, which is not installed", "pip install 'qatlib[tune]'"
            ) from None
        self._scipy: Any = scipy.optimize
        self.variables = [(name, option) for name in noises for option in noises[name] if option in latencies[name]]
        self.noise = np.array([noises[name][option] for name, option in self.variables])
        self.latency = np.array([latencies[name][option] for name, option in self.variables])
        units = list(noises)
        self._one = np.zeros((len(units), len(self.variables)))
        for column, (name, _) in enumerate(self.variables):
            self._one[units.index(name), column] = 1.0
        self._first = {name: next(iter(noises[name])) for name in units}
        self._best = {
            name: min((x for of, x in self.variables if of == name), key=lambda x: noises[name][x]) for name in units
        }

    def solve(self, bound: float) -> Vector:
        """The fastest choice whose noise is at most ``bound``; of equally fast ones that with the least noise."""
        allowed = self.noise <= bound
        limits = [] if math.isinf(bound) else [(self.noise, bound)]
        x = self._minimise(self.latency, allowed, limits)
        return self._minimise(self.noise, allowed, [*limits, (self.latency, self.total(self.latency, x))])

    def least_noise(self) -> Vector:
        return np.array([float(x == self._best[name]) for name, x in self.variables])

    def total(self, table: Vector, x: Vector) -> float:
        return float(table @ x)

    def choice(self, x: Vector) -> dict[str, Option]:
        """What is not the narrowest."""
        taken = {name: option for (name, option), on in zip(self.variables, x, strict=True) if on}
        return {name: option for name, option in taken.items() if option != self._first[name]}

    def _minimise(
        self, objective: Vector, allowed: npt.NDArray[np.bool_], limits: Sequence[tuple[Vector, float]]
    ) -> Vector:
        """Options that are not ``allowed`` are fixed at 0, and rows scaled: the solver's tolerances are absolute."""
        constraints = [self._scipy.LinearConstraint(self._one, 1.0, 1.0)]
        for row, most in limits:
            rest = np.where(allowed, row, 0.0)
            scale = _scale(rest)
            constraints.append(self._scipy.LinearConstraint(rest / scale, -np.inf, most / scale + _SLACK))
        with _quiet():
            found = self._scipy.milp(
                1e3 * objective / _scale(np.where(allowed, objective, 0.0)),
                integrality=np.ones(len(objective)),
                bounds=self._scipy.Bounds(0.0, allowed.astype(float)),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        assert found.x is not None, found.message
        return np.asarray(np.round(found.x))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what C code writes to standard output: HiGHS prints a line for some problems, ``disp`` or not."""
    flush = ctypes.CDLL(None).fflush  # what C holds back would come later
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _scale(row: Vector) -> float:
    return float(np.abs(row).max()) or 1.0
