"""Why a tensor of a dump differs from the golden one. Each cause is decided by a test on the numbers.

A test returns a :class:`Cause` only if it explains every differing element; what explains part of them is evidence of
an unknown cause. Where two causes explain the same numbers both are reported, the more specific first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qatlib.golden import rounding
from qatlib.golden.rounding import Requantization, requantization
from qatlib.golden.vectors import Array, Entry, Golden
from qatlib.qtype import limits

LARGE_SHARE = 0.1
MOST_ULP = 64
FEWEST = 3
"""Distinct golden codes beyond a limit that show a clamp; fewer may be chance."""


@dataclass(frozen=True)
class Cause:
    """``kind`` is a stable word for programs, ``text`` the sentence for people, ``evidence`` the numbers behind it."""

    kind: str
    text: str
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Parted:
    """A tensor whose numbers differ. ``got`` and ``want`` have the same shape, the golden one.

    ``known`` are the tensors before it that the dump holds and that are equal.
    """

    golden: Golden
    entry: Entry
    got: Array
    want: Array
    known: frozenset[str] = frozenset()

    @property
    def samples(self) -> int:
        return len(self.want)

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
    def whole(self) -> bool:
        """Whether the device's numbers are integers."""
        return bool(np.isfinite(self.got).all() and (self.got == np.rint(self.got)).all())

    @cached_property
    def requantization(self) -> Requantization | None:
        return requantization(self.golden, self.entry, self.samples)

    @property
    def quantized(self) -> bool:
        return self.entry.dtype in ("int8", "int16")

    @property
    def is_input(self) -> bool:
        """Whether only pre-processing and quantization are behind it."""
        return self.entry.kind in ("input", "quantize")

    def reproduces(self, codes: Array) -> bool:
        return bool(np.array_equal(codes, self.got))


Test = Callable[[Parted], Cause | None]


def _joined(names: list[str]) -> str:
    return " or ".join(names)


# -- recomputed from the golden inputs ---------------------------------------------------------------------------------


def quantize_rounding(part: Parted) -> Cause | None:
    """``quantize`` of the golden float input by another rule."""
    if part.entry.kind != "quantize" or part.entry.scale is None:
        return None
    x = part.golden.samples(part.entry.inputs[0], part.samples).astype(np.float32)
    rules = rounding.quantize_rules(x, part.entry.scale, part.entry.dtype)
    return _rule_cause(part, [name for name, codes in rules.items() if part.reproduces(codes)], None)


def requantize_rounding(part: Parted) -> Cause | None:
    """The op's exact sums, rounded by another rule."""
    step = part.requantization
    if step is None:
        return None
    names = [name for name, rule in rounding.RULES.items() if part.reproduces(step.codes(rule))]
    if part.reproduces(step.single_precision()):
        names.append("product in float32")
    return _rule_cause(part, names, int((step.at_ties() & part.differs).sum()))


def _rule_cause(part: Parted, names: list[str], ties: int | None) -> Cause | None:
    if not names:
        return None
    text = (
        f"rounding: recomputed with {_joined(names)}, every element equals the device; the contract rounds half to even"
    )
    up, down = int((part.distance > 0).sum()), int((part.distance < 0).sum())
    evidence: dict[str, float | int | str] = {"rule": _joined(names), "one_up": up, "one_down": down}
    return Cause("rounding", text, evidence if ties is None else evidence | {"differing_at_ties": ties})


def operands(part: Parted) -> Cause | None:
    """The op without its bias or one of its terms."""
    step = part.requantization
    if step is None:
        return None
    if step.bias is not None and part.reproduces(step.without_bias().codes()):
        return Cause("operand", "operand: recomputed without the bias, every element equals the device")
    for index, name in enumerate(step.names if len(step.terms) > 1 else ()):
        if part.reproduces(step.without(index).codes()):
            return Cause("operand", f"operand: recomputed without {name}, every element equals the device")
    return None


def clamp(part: Parted) -> Cause | None:
    """The op's exact sums with another output clamp, or none."""
    step = part.requantization
    if step is None or not part.quantized:
        return None
    lo, hi = limits(part.entry.dtype)
    raw = step.unclamped()
    span = hi - lo + 1
    if part.reproduces((raw - lo) % span + lo):
        return _wraps(part, span)
    if (step.lo, step.hi) != (lo, hi) and part.reproduces(np.clip(raw, lo, hi)):
        return Cause(
            "saturation",
            f"saturation: the output clamp [{step.lo}, {step.hi}] (a fused activation) is not applied; recomputed "
            f"with [{lo}, {hi}], every element equals the device",
            {"golden_lo": step.lo, "golden_hi": step.hi, "device_min": int(part.got.min())},
        )
    return None


def scale_from_sums(part: Parted) -> Cause | None:
    """One factor k for which ``rne(k * value before rounding)`` is the device's code everywhere: its interval."""
    step = part.requantization
    if step is None or not part.whole:
        return None
    real, got = step.real(), part.got.astype(np.float64)
    real, got = np.broadcast_arrays(real, got)
    open_ = (got > step.lo) & (got < step.hi) & (real != 0)
    if open_.sum() < FEWEST:
        return None
    bounds = (got[open_] - 0.5) / real[open_], (got[open_] + 0.5) / real[open_]
    least, most = float(np.minimum(*bounds).max()), float(np.maximum(*bounds).min())
    if least > most or least <= 1.0 <= most or least <= 0:
        return None
    k = (least + most) / 2
    if not part.reproduces(np.clip(np.rint(real * k), step.lo, step.hi)) and least != most:
        return None
    power = round(float(np.log2(k)))
    exact = least <= 2.0**power <= most
    named = f"2^{power} (a shift that is {abs(power)} too {'small' if power > 0 else 'large'})" if exact else f"{k:.6g}"
    return Cause(
        "scale",
        f"scale: the sums times {named} round to the device's codes everywhere",
        {"factor": 2.0**power if exact else k, "factor_min": least, "factor_max": most},
    )


# -- from the codes alone ----------------------------------------------------------------------------------------------


def _wraps(part: Parted, span: int) -> Cause:
    count = int(part.differs.sum())
    text = f"saturation: the device wraps modulo {span} where the golden codes saturate"
    return Cause("saturation", text, {"modulo": span, "wrapped": count})


def saturation(part: Parted) -> Cause | None:
    """Wrapping at the limits, or a narrower range."""
    if not (part.quantized and part.whole):
        return None
    lo, hi = limits(part.entry.dtype)
    got, want = part.got.astype(np.int64), part.want.astype(np.int64)
    op = part.golden.ops.get(part.entry.name)
    ends = {lo, hi} if op is None else {lo, hi, int(op.attrs.get("lo", lo)), int(op.attrs.get("hi", hi))}
    moved = part.differs
    if (part.requantization is None and np.isin(want[moved], (lo, hi)).all()
            and (np.sign(got[moved]) == -np.sign(want[moved])).mean() > 0.5 and moved.sum() >= FEWEST):  # fmt: skip
        return Cause(
            "saturation",
            "saturation: the device differs only where the golden codes are at a limit, mostly with the other sign, "
            "as sums that wrap do",
            {"differing_at_limits": int(moved.sum()), "limits": f"{lo}, {hi}"},
        )
    low, high = int(got.min()), int(got.max())
    if not np.array_equal(np.clip(want, low, high), got):
        return None
    beyond = len(np.unique(want[(want < low) | (want > high)]))
    symmetric = low == -hi and bool((want[moved] == lo).all())
    if beyond < FEWEST and not symmetric:
        return None
    return Cause(
        "saturation",
        f"saturation: the device clips to [{low}, {high}], the golden codes reach [{want.min()}, {want.max()}]",
        {"device_min": low, "device_max": high, "clipped": int(moved.sum()), "op_limits": str(sorted(ends))},
    )


def constant_offset(part: Parted) -> Cause | None:
    """Device = golden + c, seen through the clamp."""
    if not (part.quantized and part.whole):
        return None
    lo, hi = limits(part.entry.dtype)
    got, want = part.got.astype(np.int64), part.want.astype(np.int64)
    inner = (got > lo) & (got < hi) & (want > lo) & (want < hi)
    steps = np.unique((got - want)[inner])
    if len(steps) != 1 or steps[0] == 0 or len(np.unique(want)) < FEWEST:
        return None
    if not np.array_equal(np.clip(want + steps[0], got.min(), got.max()), got):
        return None
    offset = int(steps[0])
    return Cause("zero_point", f"zero point: device = golden {offset:+d} everywhere", {"offset": offset})


def scale_fit(part: Parted) -> Cause | None:
    """Device = k * golden within what rounding both to codes leaves, k clearly not 1; or float numbers times k."""
    got, want = part.got.astype(np.float64), part.want.astype(np.float64)
    if not np.isfinite(got).all():
        return None
    inner = np.ones(got.shape, dtype=bool)
    if part.quantized:
        lo, hi = limits(part.entry.dtype)
        inner = (got > lo) & (got < hi) & (want > lo) & (want < hi)
    square = float((want[inner] ** 2).sum())
    if len(np.unique(want[inner])) < 8 or square == 0:
        return None
    k = float((want[inner] * got[inner]).sum()) / square
    power = 2.0 ** round(float(np.log2(k))) if k > 0 else k
    k = power if k > 0 and abs(k / power - 1) < 0.01 else k
    if k <= 0 or abs(k - 1) < 0.03:
        return None
    slack = 0.5 * (1 + k) + 1e-9 if not part.entry.is_float else 1e-5 * k * float(np.abs(want).max())
    if part.entry.dtype == "int32":
        slack = 0.5 + 1e-9 * k * float(np.abs(want).max())
    if np.abs(got - k * want)[inner].max() > slack:
        return None
    power_text = f" (2^{round(float(np.log2(k)))})" if k == power else ""
    return Cause(
        "scale", f"scale: device = {k:.6g}{power_text} times golden, within rounding", {"factor": k, "tolerance": slack}
    )


def not_rounded(part: Parted) -> Cause | None:
    """Real numbers that would round to the golden codes: a device, or a fake-quant run, that computes in float."""
    if not part.quantized or part.whole or not np.isfinite(part.got).all() or part.entry.scale is None:
        return None
    lo, hi = limits(part.entry.dtype)
    for unit, name in ((1.0, "codes"), (part.entry.scale, "real numbers")):
        codes = part.got.astype(np.float64) / unit
        if np.abs(np.clip(codes, lo, hi) - part.want).max() <= 0.501:
            return Cause(
                "dequantized",
                f"float: {name} that were never rounded to codes; rounded, they are the golden codes",
                {"max_distance_lsb": float(np.abs(codes - part.want).max())},
            )
    return None


def float_rounding(part: Parted) -> Cause | None:
    """Float outputs that differ in the last bits only."""
    if not part.entry.is_float or part.is_input or not np.isfinite(part.got).all():
        return None
    spacing = np.spacing(np.abs(part.want).max(initial=np.float32(0)).astype(np.float32))
    ulp = float((np.abs(part.got.astype(np.float64) - part.want) / spacing).max())
    if ulp > MOST_ULP:
        return None
    text = f"float arithmetic: at most {ulp:.3g} units in the last place of the largest value apart"
    return Cause("float_rounding", text, {"max_ulp": ulp})


# -- samples -----------------------------------------------------------------------------------------------------------


def batch_order(part: Parted) -> Cause | None:
    """Every sample of the device equals some golden sample."""
    if part.entry.template[:1] != (-1,) or part.golden.batch < 2:
        return None
    pool = part.golden.tensors[part.entry.name]
    keys = [row.astype(np.float64).tobytes() for row in pool]
    if len(set(keys)) < 2:
        return None
    order = []
    for row in part.got + 0.0:
        key = row.astype(np.float64).tobytes()
        if key not in keys:
            return None
        order.append(keys.index(key))
    evidence: dict[str, float | int | str] = {"golden_samples": ", ".join(map(str, order[:16]))}
    if len(order) > 1 and sorted(order) == list(range(len(keys))):
        return Cause("batch_order", "batch order: the device's samples are the golden ones in another order", evidence)
    text = f"wrong input: the device's samples are the golden samples {evidence['golden_samples']}"
    return Cause("wrong_input", text, evidence)


# -- what cannot be explained ------------------------------------------------------------------------------------------


def unknown(part: Parted) -> Cause:
    """Where and how the numbers differ, for people to go on with."""
    moved, distance = part.differs, part.distance
    got, want = part.got.astype(np.float64).ravel(), part.want.astype(np.float64).ravel()
    evidence: dict[str, float | int | str] = {
        "mean_signed_distance": float(distance.mean()),
        "share_above": float((distance > 0).mean()),
        "share_below": float((distance < 0).mean()),
        "not_finite": int((~np.isfinite(got)).sum()),
    }
    if got.std() > 0 and want.std() > 0 and np.isfinite(got).all():
        evidence["correlation"] = float(np.corrcoef(got, want)[0, 1])
    if moved.ndim > 1:
        channels = np.flatnonzero(moved.any(axis=tuple(axis for axis in range(moved.ndim) if axis != 1)))
        evidence["channels_differing"] = f"{len(channels)} of {moved.shape[1]}, first {channels[0]}"
    if moved.ndim > 2 and min(moved.shape[2:]) > 2:
        inner = moved[(slice(None), slice(None), *(slice(1, -1) for _ in moved.shape[2:]))]
        evidence["share_at_border"] = 1.0 - float(inner.sum()) / float(moved.sum())
    tried = "recomputed from its golden inputs, no other rounding, clamp or operand" if part.requantization else ""
    text = "unknown: no layout, rounding, saturation, scale or input explains the numbers"
    return Cause("unknown", f"{text} ({tried} fits either)" if tried else text, evidence)


NUMBERS: tuple[Test, ...] = (
    quantize_rounding,
    requantize_rounding,
    operands,
    clamp,
    not_rounded,
    float_rounding,
    batch_order,
    saturation,
    constant_offset,
    scale_from_sums,
    scale_fit,
)


def diagnose(part: Parted) -> tuple[Cause, ...]:
    """Causes that explain every differing element, the most specific first; one of kind "unknown" if none does."""
    from qatlib.golden.inputs import INPUTS, unrelated

    tests = (*NUMBERS[:1], *INPUTS, *NUMBERS[1:]) if part.is_input else NUMBERS
    found: dict[str, Cause] = {}
    for test in tests:
        cause = test(part)
        if cause is not None:
            found.setdefault(cause.kind, cause)
    if found:
        return tuple(found.values())
    nothing_before = not part.known or part.is_input
    stranger = unrelated(part) if nothing_before else None
    return (stranger or unknown(part),)
