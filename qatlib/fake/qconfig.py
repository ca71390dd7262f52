"""QConfig: how an operator's output and weights are quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from qatlib.errors import QConfigError
from qatlib.ops.base import Format
from qatlib.qtype import check_scale

Method = Literal["min_max", "percentile", "mse", "kl", "mix", "auto", "fixed_scale"]
METHODS: tuple[Method, ...] = get_args(Method)
Kind = Literal["moving_average", "lsq", "pact", "tqt"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class FakeQuantSpec:
    """One fake-quant module.

    ``method`` picks the threshold at calibration (``docs/calibration.md``); ``percentile`` is in percent. ``scale``
    fixes the scale (real units per code) and switches the observer off; the method fixed_scale demands it.
    ``averaging_constant`` c moves the scale in QAT: ``scale = (1 - c) * scale + c * current``; 0 keeps the calibrated
    scale. ``kind`` lsq, pact or tqt trains the scale in QAT instead (:mod:`qatlib.fake.learned`); a fixed scale stays
    fixed.
    """

    dtype: Literal["int8", "int16"] = "int8"
    method: Method = "percentile"
    percentile: float = 99.99
    bins: int = 2048
    averaging_constant: float = 0.01
    scale: float | None = None
    kind: Kind = "moving_average"

    def __post_init__(self) -> None:
        def wrong(seen: str, fix: str) -> QConfigError:
            return QConfigError("QAT142", "FakeQuantSpec", seen, fix)

        if self.dtype not in ("int8", "int16"):
            raise wrong(f"dtype {self.dtype!r}", "Use int8 or int16")
        if self.method not in METHODS:
            raise wrong(f"method {self.method!r}", f"Use one of {', '.join(METHODS)}")
        if self.kind not in KINDS:
            raise wrong(f"kind {self.kind!r}", f"Use one of {', '.join(KINDS)}")
        if not 0 < self.percentile <= 100:
            raise wrong(f"percentile {self.percentile}", "Use a value above 0, at most 100")
        if self.bins < 2 or self.bins % 2:
            raise wrong(f"bins {self.bins}", "Use an even number, 2048 by default")
        if not 0 <= self.averaging_constant <= 1:
            raise wrong(f"averaging_constant {self.averaging_constant}", "Use a value from 0 to 1")
        if self.scale is None and self.method == "fixed_scale":
            raise wrong("method 'fixed_scale' without a scale", "Give scale, by convention max/128 (int8)")
        if self.scale is not None:
            object.__setattr__(self, "scale", check_scale(self.scale, "fixed scale"))


def method_for(dtype: str, method: Method) -> Method:
    """The calibration method where none was asked for by name: 16 bits have codes for outliers that 8 bits cut off."""
    return "min_max" if dtype == "int16" and method == "percentile" else method


@dataclass(frozen=True)
class QConfig:
    """Formats of one operator. ``activation`` None asks for a high-precision (int32) output, which only a convolution
    or linear at the network's output can have. Of ``weight`` the method mse picks, channel by channel, the share of the
    largest magnitude with the least error at calibration; any other keeps all, as min_max does.
    """

    activation: FakeQuantSpec | None = FakeQuantSpec()
    weight: FakeQuantSpec = FakeQuantSpec(method="min_max", averaging_constant=1.0)

    def __post_init__(self) -> None:
        for name, legal in {"activation": FakeQuantSpec | None, "weight": FakeQuantSpec}.items():
            spec = getattr(self, name)
            if not isinstance(spec, legal):
                seen = f"{name} is {spec!r}, which is no FakeQuantSpec"
                raise QConfigError("QAT142", "QConfig", seen, 'Write FakeQuantSpec(dtype="int16") for a format alone')

        if self.weight.kind == "pact":
            fix = "Use moving_average, lsq or tqt for weights: PACT clips activations"
            raise QConfigError("QAT142", "QConfig", "weight has the kind 'pact'", fix)

    def with_format(self, format: Format | None) -> QConfig:
        """A copy with the format that an inner step asks for."""
        if format is None or self.activation is None:
            return self
        dtype, method = format.dtype or self.activation.dtype, self.activation.method
        if method == "fixed_scale":  # the scale is that of the operator's own output only
            method = FakeQuantSpec.method
        return self.with_activation(dtype=dtype, scale=format.scale, method=method_for(dtype, method))

    def with_activation(self, **changes: Any) -> QConfig:
        """A copy with other settings of the activation."""
        spec = replace(self.activation or FakeQuantSpec(), **changes)
        return replace(self, activation=spec)


def get_default_qconfig(
    activation: str = "int8", method: str = "percentile", high_precision: bool = False, weight: str = "int8"
) -> QConfig:
    """QConfig with min-max weights per channel and the given output format; raises QConfigError (QAT142)."""
    weights = replace(QConfig().weight, dtype=weight)  # type: ignore[arg-type]
    if high_precision:
        return QConfig(None, weights)
    return QConfig(FakeQuantSpec(dtype=activation, method=method), weights)  # type: ignore[arg-type]


default_calib_8bit_fake_quant_qconfig = get_default_qconfig()
default_qat_8bit_fake_quant_qconfig = get_default_qconfig()
default_qat_8bit_fixed_act_fake_quant_qconfig = get_default_qconfig().with_activation(averaging_constant=0.0)
default_calib_8bit_weight_16bit_act_fake_quant_qconfig = get_default_qconfig("int16", "min_max")
default_qat_8bit_weight_16bit_act_fake_quant_qconfig = get_default_qconfig("int16", "min_max")
default_calib_8bit_weight_32bit_out_fake_quant_qconfig = get_default_qconfig(high_precision=True)
default_qat_8bit_weight_32bit_out_fake_quant_qconfig = get_default_qconfig(high_precision=True)
default_calib_16bit_fake_quant_qconfig = get_default_qconfig("int16", "min_max", weight="int16")
"""16 bits in activations and weights; for targets that take int16 weights."""
