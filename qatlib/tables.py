"""Tables of unary functions: the section "Tables" of ``docs/numerics.md``.

A table is built from a float64 function and read by integers alone. 8-bit inputs have one entry per code. 16-bit inputs
have segments of entries 2^h codes apart, with linear interpolation between them. Everything here is NumPy, so that
``params.yaml`` can be checked without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qatlib.errors import ProgramError
from qatlib.qtype import QType, limits

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Function = Callable[[Floats], Floats]
Range = tuple[int, int]
Reals = tuple[float, float]

DIVISIONS = ("uniform", "curvature", "auto")
SYMMETRIES = ("none", "odd", "even", "auto")
LARGEST_STEP = 15
"""``(T[j+1] - T[j]) * frac`` then stays in 32 bits."""
_INT16 = limits("int16")
_NONE: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True)
class TableSpec:
    """What a user may choose of a table. All but ``range`` concern 16-bit inputs only.

    ``division`` places the segments: ``uniform`` is one spacing everywhere, ``curvature`` is finer where the function
    bends more, ``auto`` the one of these two with the smaller worst error; a tuple gives the inner break points in real
    units. ``segments`` is the most that ``curvature`` may use, ``entries`` the most steps between entries, all segments
    together (each segment stores one entry more than it has steps). ``range`` (low, high), in real units, clamps the
    input. ``symmetry`` odd or even stores the half at x >= 0.

    Raises ProgramError (QAT211).
    """

    division: str | tuple[float, ...] = "auto"
    segments: int = 16
    entries: int = 512
    range: Reals | None = None
    symmetry: str = "auto"

    def __post_init__(self) -> None:
        def wrong(seen: str, fix: str) -> ProgramError:
            return ProgramError("QAT211", "table", seen, fix)

        if isinstance(self.division, str):
            if self.division not in DIVISIONS:
                raise wrong(f"division {self.division!r}", f"Use {', '.join(DIVISIONS)} or a list of break points")
        elif not (isinstance(self.division, tuple) and self.division and _increasing(self.division)):
            raise wrong(f"division {self.division!r}", f"Use {', '.join(DIVISIONS)} or a list of increasing numbers")
        if self.symmetry not in SYMMETRIES:
            raise wrong(f"symmetry {self.symmetry!r}", f"Use {', '.join(SYMMETRIES)}")
        if not 1 <= self.segments <= 256:
            raise wrong(f"segments {self.segments}", "Use 1 to 256")
        least = 2 if isinstance(self.division, str) else len(self.division) + 1
        if not least <= self.entries <= 65536:
            raise wrong(f"entries {self.entries}", f"Use {least} to 65536")
        if self.range is not None and not (len(self.range) == 2 and _increasing(self.range)):
            raise wrong(f"range {list(self.range)}", "Give [low, high], finite, low below high")


DEFAULT_TABLE = TableSpec()


def _increasing(values: tuple[float, ...]) -> bool:
    return all(map(math.isfinite, values)) and all(a < b for a, b in pairwise(values))


@dataclass(frozen=True)
class Table:
    """A table that can be read. ``steps``, ``starts`` and ``offsets`` are empty for 8-bit inputs (one entry per code).

    Segment k begins at code ``starts[k]``; its entries are ``entries[offsets[k]:]``, ``2^steps[k]`` codes apart, in
    units of ``2^-extra_bits`` output codes. Input codes are clamped to ``codes`` first (their magnitude if symmetric).
    ``lo, hi`` is the range of the output codes; ``range`` the clamp of the input in real units, if there is one.
    """

    division: str
    entries: Ints
    starts: Ints
    steps: Ints
    offsets: Ints
    codes: Range
    symmetry: str
    extra_bits: int
    range: Reals | None
    lo: int
    hi: int
    worst_lsb: float = 0.0
    mean_lsb: float = 0.0

    @property
    def direct(self) -> bool:
        """Whether there is one entry per input code."""
        return len(self.starts) == 0

    def __call__(self, x: Ints) -> Ints:
        """Output codes of input codes."""
        if self.direct:
            return np.clip(self.entries[x - limits("int8")[0]], self.lo, self.hi)
        u = np.clip(x if self.symmetry == "none" else np.abs(x), *self.codes)
        k = np.searchsorted(self.starts, u, side="right") - 1
        h, distance = self.steps[k], u - self.starts[k]
        j = self.offsets[k] + (distance >> h)
        frac = distance & ((1 << h) - 1)
        after = self.entries[np.minimum(j + 1, len(self.entries) - 1)]  # where frac is 0, any entry does
        y = self.entries[j] + rne((after - self.entries[j]) * frac, h)
        if self.symmetry == "odd":
            y = np.where(x < 0, -y, y)
        return np.clip(rne(y, np.int64(self.extra_bits)), self.lo, self.hi)

    def expanded(self) -> Ints:
        """The output code of every input code, smallest first: 256 or 65,536 entries."""
        qmin, qmax = limits("int8" if self.direct else "int16")
        return self(np.arange(qmin, qmax + 1))

    # -- as part of a Program ------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Attribute ``table`` of the Program op. The errors are in output codes."""
        return {
            "division": self.division,
            "segments": max(1, len(self.starts)),
            "entries": len(self.entries),
            "range": None if self.range is None else list(self.range),
            "codes": list(self.codes),
            "symmetry": self.symmetry,
            "extra_bits": self.extra_bits,
            "worst_lsb": self.worst_lsb,
            "mean_lsb": self.mean_lsb,
        }

    def constants(self) -> dict[str, NDArray[Any]]:
        """Constants of the Program op by role: ``table``, and for 16-bit inputs ``start``, ``step``, ``offset``."""
        if self.direct:
            small = self.lo >= limits("int8")[0] and self.hi <= limits("int8")[1]
            return {"table": self.entries.astype(np.int8 if small else np.int16)}
        parts = {"start": self.starts, "step": self.steps, "offset": self.offsets}
        return {"table": self.entries.astype(np.int16)} | {role: part.astype(np.int32) for role, part in parts.items()}

    @staticmethod
    def read(attrs: Mapping[str, Any], constants: Mapping[str, NDArray[Any]]) -> Table:
        """The table of a Program op from its attributes and constants by role."""
        found = attrs["table"]

        def part(role: str) -> Ints:
            return constants[role].astype(np.int64) if role in constants else _NONE

        return Table(
            division=found["division"],
            entries=part("table"),
            starts=part("start"),
            steps=part("step"),
            offsets=part("offset"),
            codes=tuple(found["codes"]),
            symmetry=found["symmetry"],
            extra_bits=found["extra_bits"],
            range=None if found["range"] is None else tuple(found["range"]),
            lo=attrs["lo"],
            hi=attrs["hi"],
            worst_lsb=found["worst_lsb"],
            mean_lsb=found["mean_lsb"],
        )


def rne(numerator: Ints, shift: Ints | np.int64) -> Ints:
    """``numerator / 2^shift`` rounded half to even; exact for magnitudes below 2^53."""
    return cast(Ints, np.rint(np.ldexp(numerator.astype(np.float64), -shift)).astype(np.int64))


# -- building ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The input of a table: its format, the codes that can occur, and the real range seen in calibration, if any."""

    qtype: QType
    codes: Range
    observed: Reals | None = None


def build(f: Function, source: Source, out: QType, clamp: Range, spec: TableSpec, where: str) -> Table:
    """The table of ``f`` from ``source`` to ``out``, its output codes within ``clamp``.

    ``f`` maps float64 reals to float64 reals. Raises ProgramError: QAT210 if ``f`` is not finite on the range, QAT212
    if it lacks the symmetry asked for, QAT213 if the range or a break point lies outside of the input's codes.
    """
    assert source.qtype.scale is not None
    assert out.scale is not None
    s_x, s_y, (lo, hi) = source.qtype.scale, out.scale, clamp
    span = _input_range(f, source, spec, where)

    def real(codes: Ints) -> Floats:
        """``f`` in output codes, neither rounded nor clamped."""
        x = codes * s_x
        with np.errstate(all="ignore"):
            return f(x if span is None else np.clip(x, span[0], span[1])) / s_y

    if source.qtype.dtype == "int8":
        entries = np.rint(np.clip(real(np.arange(-128, 128).clip(*source.codes)), lo, hi)).astype(np.int64)
        table = Table("exact", entries, _NONE, _NONE, _NONE, source.codes, "none", 0, span, lo, hi)
        return _measured(table, real, source, clamp)
    symmetry, codes = _half(real, _covered(source, span, where), spec, where)
    bounds = (-max(hi, -lo), max(hi, -lo)) if symmetry == "odd" else (lo, hi)
    values = np.clip(real(np.arange(codes[0], codes[1] + 1)), *bounds)
    tables = [
        _measured(_segmented(name, values, parts, codes, symmetry, span, clamp), real, source, clamp)
        for name, parts in _divisions(values, codes[0], s_x, spec, where)
    ]
    return min(tables, key=lambda table: (table.worst_lsb, table.mean_lsb))


def _input_range(f: Function, source: Source, spec: TableSpec, where: str) -> Reals | None:
    """Real range to which the input is clamped: the user's; none if ``f`` is finite everywhere; the calibrated one.

    A calibrated end is moved out to the code that it is quantized to, where ``f`` is finite there.
    """
    s_x = source.qtype.scale
    assert s_x is not None
    x = np.arange(source.codes[0], source.codes[1] + 1) * s_x
    spans: list[Reals | None] = [None]
    if spec.range is not None:
        spans = [spec.range]
    elif source.observed is not None:
        first, last = (code * s_x for code in source.codes)
        low, high = (min(max(end, first), last) for end in source.observed)
        lowest, highest = min(low, float(np.rint(low / s_x)) * s_x), max(high, float(np.rint(high / s_x)) * s_x)
        spans += [(lowest, highest), (lowest, high), (low, highest), (low, high)]
    for span in spans:
        inside = x if span is None else np.clip(x, span[0], span[1])
        with np.errstate(all="ignore"):
            values = f(inside)
        if np.isfinite(values).all():
            return span
    bad = int(np.argmin(np.isfinite(values)))
    kind = "given" if spec.range else "calibrated" if span else "quantized"
    low, high = span or (x[0], x[-1])
    raise ProgramError(
        "QAT210",
        where,
        f"the function is {values[bad]} at {inside[bad]:.6g}, inside the {kind} input range [{low:.6g}, {high:.6g}]",
        f"Add a record to convert.tables (match: {where}, range: where it is finite), or an epsilon to the model",
    )


def _covered(source: Source, span: Reals | None, where: str) -> Range:
    """Codes between which the function varies: those that occur, cut to the range."""
    (first, last), s_x = source.codes, source.qtype.scale
    assert s_x is not None
    if span is None:
        return first, last
    if span[1] < first * s_x or span[0] > last * s_x:
        raise ProgramError(
            "QAT213",
            where,
            f"range [{span[0]:.6g}, {span[1]:.6g}] has no part in the input's [{first * s_x:.6g}, {last * s_x:.6g}]",
            "Choose a range within the input's",
        )
    return max(first, math.floor(span[0] / s_x)), min(last, math.ceil(span[1] / s_x))


def _half(real: Callable[[Ints], Floats], codes: Range, spec: TableSpec, where: str) -> tuple[str, Range]:
    """The symmetry to use, and the codes to store: magnitudes if it is odd or even."""
    if spec.symmetry == "none" or (spec.symmetry == "auto" and not codes[0] < 0 < codes[1]):
        return "none", codes
    largest = max(-codes[0], codes[1])
    positive, negative = real(np.arange(largest + 1)), real(-np.arange(largest + 1))
    for name, mirrored in (("even", positive), ("odd", -positive)):
        if spec.symmetry in (name, "auto") and np.allclose(negative, mirrored, rtol=1e-12, atol=1e-9):
            return name, (0, largest)
    if spec.symmetry != "auto":
        raise ProgramError(
            "QAT212",
            where,
            f"is not {spec.symmetry} on the table's range",
            "Set symmetry: auto or none, or a range that is symmetric",
        )
    return "none", codes


def _measured(table: Table, real: Callable[[Ints], Floats], source: Source, clamp: Range) -> Table:
    """The table with its errors over the codes that occur, and the output codes that they give."""
    codes = np.arange(source.codes[0], source.codes[1] + 1)
    y = table(codes)
    error = np.abs(y - np.clip(real(codes), *clamp))
    worst, mean = float(error.max()), float(error.mean())
    return replace(table, lo=int(y.min()), hi=int(y.max()), worst_lsb=worst, mean_lsb=mean)


# -- dividing the range ------------------------------------------------------------------------------------------------

Parts = tuple[Ints, Ints]
"""First index and step exponent h of every segment."""


def _divisions(values: Floats, first: int, s_x: float, spec: TableSpec, where: str) -> list[tuple[str, Parts]]:
    """The divisions to try; ``values`` are the function at all codes from ``first`` on."""
    found = []
    if isinstance(spec.division, tuple):
        inner = np.rint(np.array(spec.division) / s_x) - first
        if inner[0] <= 0 or inner[-1] >= len(values) or (np.diff(inner) <= 0).any():
            raise ProgramError(
                "QAT213",
                where,
                f"break points {list(spec.division)} are not separate codes inside of the table's"
                f" [{first * s_x:.6g}, {(first + len(values) - 1) * s_x:.6g}]",
                "Choose break points within the range (x > 0 if the function is odd or even), or symmetry: none",
            )
        found.append(("given", np.concatenate([[0], inner]).astype(np.int64)))
    if spec.division in ("uniform", "auto"):
        found.append(("uniform", np.zeros(1, np.int64)))
    divisions = [(name, (starts, np.full(len(starts), _coarsest(len(values))))) for name, starts in found]
    if spec.division in ("curvature", "auto"):
        divisions.append(("curvature", _curved(values, spec)))
        # Entries left over let a segment be refined whose last entry would lie beyond 16 bits.
        divisions.append(("curvature", _curved(values, replace(spec, entries=max(2, spec.entries // 2)))))
    return [(name, _refined(values, parts, spec.entries)) for name, parts in divisions]


def _coarsest(codes: int) -> int:
    return min(LARGEST_STEP, max(0, codes - 1).bit_length())


def _chord_errors(values: Floats, h: int, reach: Reals) -> Floats:
    """At every code of a segment, the distance of ``values`` from the chord between the entries around it.

    The entry behind the last code, where the last step passes it, is cut to what an entry can hold, ``reach``.
    """
    u = np.arange(len(values))
    a = (u >> h) << h
    b = np.minimum(a + (1 << h), len(values) - 1)
    slope = (values[b] - values[a]) / np.maximum(b - a, 1)
    last = a[-1]
    end = np.clip(values[last] + slope[last] * (1 << h), *reach)
    slope[last:] = (end - values[last]) / (1 << h)
    errors: Floats = np.abs(values[a] + slope * (u - a) - values)
    return errors


def _pieces(lengths: Ints, steps: Ints) -> Ints:
    """Steps between entries: segments of ``lengths`` codes, the last of which may be an entry itself."""
    return -((1 - lengths) >> steps)


def _curved(values: Floats, spec: TableSpec) -> Parts:
    """Segments for the least error that fits: about ``|f''| * (2^h s_x)^2 / 8`` in every interval.

    At a tolerance, each code gets the widest aligned interval 2^h whose chord stays within it; runs of one h are the
    segments, of which neighbours merge at the least cost until they are few enough. The tolerance is bisected.
    """
    coarsest = _coarsest(len(values))
    errors = np.empty((coarsest + 1, len(values)), np.float32)
    for h in range(coarsest + 1):
        chords = _chord_errors(values, h, _reach(values))
        largest = np.maximum.reduceat(chords, np.arange(0, len(values), 1 << h))
        errors[coarsest - h] = np.repeat(largest, 1 << h)[: len(values)]
    best, low, high = (np.zeros(1, np.int64), np.array([coarsest])), -12.0, 17.0
    for _ in range(14):
        middle = (low + high) / 2
        steps = coarsest - np.argmax(errors <= 2.0**middle, axis=0)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(steps)) + 1])
        merged = _merged(starts, steps[starts], len(values), spec)
        if merged is None:
            low = middle
        else:
            best, high = merged, middle
    return best


def _merged(starts: Ints, steps: Ints, codes: int, spec: TableSpec) -> Parts | None:
    """At most ``spec.segments`` segments, neighbours joined at the finer step; None if the entries do not suffice."""
    while True:
        lengths = np.diff(starts, append=codes)
        if _pieces(lengths, steps).sum() > spec.entries:
            return None
        if len(starts) <= spec.segments:
            return starts, steps
        finer = np.minimum(steps[:-1], steps[1:])
        joined = _pieces(lengths[:-1] + lengths[1:], finer)
        k = int(np.argmin(joined - _pieces(lengths[:-1], steps[:-1]) - _pieces(lengths[1:], steps[1:])))
        steps = np.delete(steps, k + 1)
        steps[k] = finer[k]
        starts = np.delete(starts, k + 1)


def _refined(values: Floats, parts: Parts, entries: int) -> Parts:
    """Halve the step of the segment with the largest error for as long as ``entries`` suffice."""
    starts, steps = parts[0], parts[1].copy()
    segments = np.split(values, starts[1:])
    lengths = np.array([len(segment) for segment in segments])
    reach = _reach(values)
    errors = np.array([_chord_errors(part, h, reach).max() for part, h in zip(segments, steps.tolist(), strict=True)])
    while True:
        pieces = _pieces(lengths, steps)
        finer = _pieces(lengths, np.maximum(steps - 1, 0)) - pieces
        able = (steps > 0) & (errors > 0) & (pieces.sum() + finer <= entries)
        if not able.any():
            return starts, steps
        k = int(np.argmax(np.where(able, errors, -1.0)))
        steps[k] -= 1
        errors[k] = _chord_errors(segments[k], int(steps[k]), reach).max()


def _extra_bits(values: Floats) -> int:
    """Bits of the entries below an output code: as many as 16 bits leave."""
    largest = float(np.abs(values).max())
    return next(e for e in range(15, -1, -1) if largest * 2**e <= 2**15 or e == 0)


def _reach(values: Floats) -> Reals:
    """Least and largest value of an entry, in output codes."""
    low, high = (end / 2 ** _extra_bits(values) for end in _INT16)
    return low, high


def _segmented(
    division: str, values: Floats, parts: Parts, codes: Range, symmetry: str, span: Reals | None, clamp: Range
) -> Table:
    """Entries of every segment. A last step that passes the segment's last code is the chord through that code."""
    extra = _extra_bits(values)
    entries: list[Floats] = []
    offsets, stored = [], 0
    for segment, h in zip(np.split(values, parts[0][1:]), parts[1].tolist(), strict=True):
        at = segment[:: 1 << h]
        rest = (len(segment) - 1) & ((1 << h) - 1)
        end = at[-1:] + (segment[-1] - at[-1]) * ((1 << h) / rest) if rest else at[:0]
        entries += [at, end]
        offsets.append(stored)
        stored += len(at) + len(end)
    scaled = np.clip(np.rint(np.concatenate(entries) * 2.0**extra), *_INT16).astype(np.int64)
    starts = parts[0] + codes[0]
    return Table(division, scaled, starts, parts[1], np.array(offsets), codes, symmetry, extra, span, *clamp)
