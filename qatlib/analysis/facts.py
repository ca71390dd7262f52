"""The one input of all rules: everything the stages measured, as frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import qatlib.ops  # noqa: F401 registers the operators
from qatlib.analysis.edits import Edit, Record, input_format, override
from qatlib.analysis.scored import STAGE_TITLES as STAGE_TITLES
from qatlib.analysis.scored import STAGES as STAGES
from qatlib.ops.base import BY_KIND
from qatlib.pipeline.config import Goal, Ignore

if TYPE_CHECKING:
    from qatlib.analysis.call_sites import CallSite
    from qatlib.analysis.op_facts import OpFact
    from qatlib.analysis.records import Capture
    from qatlib.analysis.statistics import StatisticsTable
    from qatlib.analysis.study import Study
    from qatlib.analysis.unfused import Unfused
    from qatlib.fake.coverage import Coverage
    from qatlib.fake.formats import FormatRow
    from qatlib.fake.ranges import Range
    from qatlib.pipeline.calibration import Compared


@dataclass(frozen=True)
class InputFact:
    """Range of one model input over the analysis data, before quantization. ``scale`` and ``dtype`` are its format."""

    name: str
    min: float
    max: float
    mean: float
    dtype: str
    scale: float | None


@dataclass(frozen=True)
class Facts:
    """``metrics`` maps a stage to its flat metrics (``accuracy``, ``images``, …); ``metric`` names the one that is
    scored.

    ``state`` is the FakeQuantState name of the model when it was scored, None when that is not known. ``floor`` is the
    least acceptable float metric (greatest, where lower is better), ``max_train_val_gap`` the largest train-val gap.
    The float metrics may hold that gap as ``train_val_gap``, or the metric on training data as ``train_<metric>``.
    ``ranges`` are those of calibration, beside held-out data; ``unfused`` is what fusion left alone, ``formats`` what
    every op got, ``equalizable`` the ops whose channels ``calibrate.equalize`` would give like ranges.
    ``overrides`` and ``input_formats`` are the lists of qconfig as they stand, ``tables`` and ``preserve`` those of
    convert, ``hybrid`` that of qat, ``unshare`` that of model; an edit has to keep them. ``shared`` are the calls of
    modules that are called several times, ``statistics`` the statistics tables by mode. ``study`` is what
    ``analyze.sensitivity`` asked for; ``ignore`` names findings that are known. ``compared`` are the scores of
    ``calibrate.compare``; ``calibration`` is the method that was used, with its percentile.
    """

    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metric: str = "accuracy"
    higher_is_better: bool = True
    goals: tuple[Goal, ...] = ()
    ignore: tuple[Ignore, ...] = ()
    state: str | None = None
    floor: float | None = None
    max_train_val_gap: float = 0.08
    overrides: tuple[Record, ...] = ()
    input_formats: tuple[Record, ...] = ()
    tables: tuple[Record, ...] = ()
    inputs: tuple[InputFact, ...] = ()
    fvsq: Capture | None = None
    qvsq: Capture | None = None
    ops: tuple[OpFact, ...] = ()
    coverage: Coverage | None = None
    ranges: tuple[Range, ...] = ()
    unfused: tuple[Unfused, ...] = ()
    formats: tuple[FormatRow, ...] = ()
    equalizable: tuple[str, ...] = ()
    study: Study | None = None
    hybrid: tuple[str, ...] = ()
    preserve: tuple[str, ...] = ()
    compared: tuple[Compared, ...] = ()
    calibration: tuple[str, float | None] = ("percentile", 99.99)
    shared: tuple[CallSite, ...] = ()
    unshare: tuple[str, ...] = ()
    statistics: Mapping[str, StatisticsTable] = field(default_factory=dict)

    def value(self, stage: str, key: str | None = None) -> float | None:
        """Metric ``key`` (the scored one by default) of ``stage``; None if missing or not finite."""
        found = self.metrics.get(stage, {}).get(key or self.metric)
        return float(found) if found is not None and math.isfinite(found) else None

    def maker(self, name: str) -> str:
        """The op whose format value ``name`` has: itself, or what it passes on (a reshape, a pool)."""
        ops = {op.name: op for op in self.ops}
        while (op := ops.get(name)) and op.inputs and op.kind in BY_KIND and BY_KIND[op.kind].keeps_scale:
            name = op.inputs[0]
        return name

    def narrower(self, name: str) -> Edit:
        """The edit that gives value ``name`` int8."""
        name = self.maker(name)
        source = name.removesuffix(".quant")
        if source in {fact.name for fact in self.inputs}:
            return input_format(source, self.input_formats, activation="int8")
        where = next((op.where for op in self.ops if op.name == name), name)
        return override(where, self.overrides, activation="int8")

    def predicted_by(self, method: str) -> dict[str, float]:
        """What another ``calibrate.method`` changes, by :attr:`compared`; empty unless both methods were scored."""
        scores = {(one.method, one.percentile): one.value for one in self.compared}
        new, old = scores.get((method, None)), scores.get(self.calibration)
        return {} if new is None or old is None else {"metric": new - old}

    def ratio(self, stage: str, base: str = "float") -> float | None:
        """``stage / base`` of the scored metric, inverted when lower is better; None if either is missing or 0."""
        top, bottom = self.value(stage), self.value(base)
        if not self.higher_is_better:
            top, bottom = bottom, top
        return None if top is None or not bottom else top / bottom

    def goal_minimum(self, key: str, default: float) -> float:
        """Lower bound that the goals set for ``key``, else ``default``."""
        return next((g.min for g in self.goals if g.metric == key and g.min is not None), default)

    @property
    def fake_quant_stage(self) -> str:
        """The stage whose model was converted: QAT where it ran, else calibration."""
        return "qat" if self.value("qat") is not None else "calib"


def input_facts(capture: Capture) -> tuple[InputFact, ...]:
    """Facts of the model inputs in a capture whose reference is the float model; formats are the other model's.

    What follows an operator left in float is quantized, too, and is no input.
    """
    computed = {record.name for record in capture.records}
    return tuple(
        InputFact(r.inputs[0], seen.min, seen.max, seen.mean, r.qtype.dtype, r.scale)
        for r in capture.records
        if r.op == "quantize" and r.inputs[0] not in computed and (seen := r.reference) is not None
    )
