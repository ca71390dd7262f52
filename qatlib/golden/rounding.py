"""What an op makes before it rounds, and the rules by which a device may round it.

The value before rounding is ``sum(term_i * factor_i)``, a factor M / 2^n of sections 3 and 4 of ``docs/numerics.md``.
It has at most 53 bits, so float64 holds it exactly, and a rule is a function of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from qatlib.golden.vectors import Array
from qatlib.integer import INT32

Rule = Callable[[Array], Array]
"""Real numbers to integers."""


def half_up(x: Array) -> Array:
    """``(numerator + 2^(n-1)) >> n``: halves go towards plus infinity."""
    floor = np.floor(x)
    return np.asarray(floor + (x - floor >= 0.5))


def half_away(x: Array) -> Array:
    """C's ``round``: halves go away from zero."""
    return np.asarray(np.sign(x) * half_up(np.abs(x)))


def half_to_zero(x: Array) -> Array:
    """Halves go towards zero."""
    floor = np.floor(np.abs(x))
    return np.asarray(np.sign(x) * (floor + (np.abs(x) - floor > 0.5)))


RULES: dict[str, Rule] = {
    "half away from zero": half_away,
    "half up": half_up,
    "half towards zero": half_to_zero,
    "floor (arithmetic shift)": np.floor,
    "towards zero (truncation)": np.trunc,
}


@dataclass(frozen=True)
class Unrounded:
    """``clamp(rne(sum(term * factor)), lo, hi)`` of one op before any of it is done; arrays broadcast against it.

    ``names`` says what each term is. ``bias`` is a part of the first term. ``sums`` tells whether the first term is an
    accumulator, saturated once to int32. ``inexact`` is the relative error of the value, 0 if it is made of integers.
    ``others`` are values that a device may round instead, by what it does.
    """

    terms: tuple[Array, ...]
    factors: tuple[Array, ...]
    lo: int
    hi: int
    names: tuple[str, ...] = ()
    bias: Array | None = None
    sums: bool = False
    inexact: float = 0.0
    others: Mapping[str, Array] = field(default_factory=dict)

    @cached_property
    def real(self) -> Array:
        """The value before rounding, in output codes."""
        return np.asarray(sum(self._products()))

    def _products(self) -> Iterator[Array]:
        terms = (np.clip(self.terms[0], *INT32), *self.terms[1:]) if self.sums else self.terms
        return (term * factor for term, factor in zip(terms, self.factors, strict=True))

    def codes(self, rule: Rule = np.rint) -> Array:
        """Output codes, as float64."""
        return np.clip(rule(self.real), self.lo, self.hi)

    # -- what a device may make of it, as output codes ------------------------------------------------------------

    def other(self, name: str) -> Array:
        """One of :attr:`others`, rounded."""
        return np.clip(np.rint(self.others[name]), self.lo, self.hi)

    def rounded_apart(self) -> Array:
        """Each term rounded before they are added."""
        return np.clip(sum(np.rint(product) for product in self._products()), self.lo, self.hi)

    def in_single(self) -> Array:
        """Terms multiplied with float32 factors and added in float32."""
        pairs = zip(self.terms, self.factors, strict=True)
        total = sum(term.astype(np.float32) * factor.astype(np.float32) for term, factor in pairs)
        return np.clip(np.rint(np.asarray(total, np.float64)), self.lo, self.hi)

    def without(self, index: int) -> Array:
        """One term left out."""
        terms, factors = ((*items[:index], *items[index + 1 :]) for items in (self.terms, self.factors))
        return replace(self, terms=terms, factors=factors, sums=self.sums and index > 0).codes()

    def without_bias(self) -> Array:
        assert self.bias is not None
        return replace(self, terms=(self.terms[0] - self.bias, *self.terms[1:])).codes()

    def clamped(self, lo: int, hi: int) -> Array:
        """Another output clamp."""
        return np.clip(np.rint(self.real), lo, hi)

    def wrapped(self, lo: int, hi: int) -> Array:
        """Codes that wrap to [lo, hi]."""
        return (np.rint(self.real) - lo) % (hi - lo + 1) + lo

    def narrowed(self, bits: int, wraps: bool) -> Array:
        """Sums that wrap, or saturate, in ``bits`` bits."""
        half, total = 2.0 ** (bits - 1), self.terms[0]
        narrow = np.mod(total + half, 2 * half) - half if wraps else np.clip(total, -half, half - 1)
        return replace(self, terms=(narrow, *self.terms[1:]), sums=False).codes()

    # -- a part of it ---------------------------------------------------------------------------------------------

    def at(self, shape: tuple[int, ...], positions: Array) -> Unrounded:
        """Of single elements of the output, which has ``shape``, at flat ``positions``."""

        def pick(array: Array) -> Array:
            return np.asarray(np.broadcast_to(array, shape).flat[positions])

        return replace(
            self,
            terms=tuple(map(pick, self.terms)),
            factors=tuple(map(pick, self.factors)),
            bias=None if self.bias is None else pick(self.bias),
            others={how: pick(value) for how, value in self.others.items()},
        )

    def at_ties(self) -> Array:
        """Where the value lies exactly between two codes."""
        return np.asarray(self.real - np.floor(self.real) == 0.5)

    def factors_within(self, codes: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """Per group that ``axes`` reduce, the least and largest k for which ``rne(k * value)`` is ``codes`` throughout.

        A code at a limit bounds k on one side. There is no such k where the least exceeds the largest.
        """
        real, codes = np.broadcast_arrays(self.real, codes.astype(np.float64))
        slack = 0.5 + self.inexact * np.abs(codes)
        low = np.where(codes <= self.lo, -np.inf, codes - slack)
        high = np.where(codes >= self.hi, np.inf, codes + slack)
        low, high = np.where(real < 0, high, low) / real, np.where(real < 0, low, high) / real
        zero, fits = real == 0, (codes >= self.lo) & (codes <= self.hi) & (np.clip(0, self.lo, self.hi) == codes)
        least = np.where(zero, np.where(fits, -np.inf, np.inf), low).max(axes, keepdims=True)
        most = np.where(zero, np.inf, high).min(axes, keepdims=True)
        return least, most
