"""Why a tensor of a dump differs from the golden one: what a cause is, and what the tests of all kinds look at.

A test yields a :class:`Cause` only if it explains every differing element; what explains part of them is evidence of an
unknown cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qatlib.golden.recompute import unrounded
from qatlib.golden.rounding import Unrounded
from qatlib.golden.vectors import Array, Entry, Golden
from qatlib.qtype import limits

FEWEST = 3
"""Differing elements, or distinct codes, that a cause with a free number has to explain; fewer may be chance."""

SOME = 1 << 12
"""Elements that are looked at before all of them are."""


@dataclass(frozen=True)
class Cause:
    """``kind`` is a stable word for programs, ``text`` the sentence for people, ``evidence`` the numbers behind it."""

    kind: str
    text: str
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Parted:
    """A tensor whose numbers differ. ``got`` and ``want`` are those of ``samples`` samples, in golden axes.

    ``known`` are the tensors before it that the dump holds and that are equal.
    """

    golden: Golden
    entry: Entry
    got: Array
    want: Array
    samples: int
    known: frozenset[str] = frozenset()

    @cached_property
    def differs(self) -> Array:
        return np.asarray(self.got != self.want)

    @cached_property
    def distance(self) -> Array:
        """Device minus golden in units of the golden tensor: codes, or LSB of the accumulator behind a float."""
        wide = self.got.astype(np.float64) - self.want.astype(np.float64)
        lsb = self.golden.lsb(self.entry.name)
        return np.asarray(wide if lsb is None else wide / lsb)

    @cached_property
    def finite(self) -> bool:
        return bool(np.isfinite(self.got).all())

    @cached_property
    def whole(self) -> bool:
        """Whether the device's numbers are integers."""
        return self.finite and bool((self.got == np.rint(self.got)).all())

    @cached_property
    def some(self) -> Array:
        """Flat positions of some thousand elements, of which half differ: what does not explain these is no cause."""
        every = (np.arange(self.got.size), np.flatnonzero(self.differs))
        return np.concatenate([positions[:: -(-len(positions) // SOME) or 1] for positions in every])

    @cached_property
    def step(self) -> Unrounded | None:
        """What the op rounded, recomputed from its golden inputs."""
        return unrounded(self.golden, self.entry, self.samples)

    @property
    def quantized(self) -> bool:
        return self.entry.dtype in ("int8", "int16")

    @property
    def clamps(self) -> set[tuple[float, float]]:
        """Through which a device may have put the numbers: none, or that of the dtype and that of the op."""
        if not self.quantized:
            return {(-np.inf, np.inf)}
        lo, hi = limits(self.entry.dtype)
        op = self.golden.ops.get(self.entry.name)
        own = {} if op is None else op.attrs
        return {(lo, hi), (own.get("lo", lo), own.get("hi", hi))}

    @property
    def is_input(self) -> bool:
        return self.golden.is_input(self.entry)

    @property
    def source_known(self) -> bool:
        """Whether the dump holds everything that the op reads, equal to the golden vectors."""
        return bool(self.entry.inputs) and self.known.issuperset(self.entry.inputs)

    def follows(self, numbers: Array, slack: float = 0.0) -> bool:
        """Whether the device holds ``numbers``, which grow with the golden ones, within ``slack`` through a clamp.

        Where a golden code is at the limit, all that is beyond may have been clamped to it.
        """
        for lo, hi in self.clamps:
            low = np.where(self.want <= lo, -np.inf, numbers - slack)
            high = np.where(self.want >= hi, np.inf, numbers + slack)
            if ((np.clip(low, lo, hi) <= self.got) & (self.got <= np.clip(high, lo, hi))).all():
                return True
        return False

    def reproduces(self, codes: Array) -> bool:
        return bool(np.array_equal(np.broadcast_to(codes, self.got.shape), self.got))


Test = Callable[[Parted], Iterator[Cause]]
