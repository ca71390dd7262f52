"""Facts without a fault, and builders that plant one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qatlib.analysis.bad_case import BadCase, BadCases
from qatlib.analysis.call_sites import CallSite
from qatlib.analysis.conversion_loss import ConversionLoss, IntegerTrial
from qatlib.analysis.distance import Distance
from qatlib.analysis.facts import Facts, InputFact
from qatlib.analysis.op_facts import OpFact, TableFact, WeightFact
from qatlib.analysis.records import Capture, Mode, OpRecord, Saturation
from qatlib.analysis.sensitivity import Sensitivity, Trial
from qatlib.analysis.stats import Comparison, RunningComparison, RunningSummary
from qatlib.analysis.study import Study
from qatlib.analysis.unfused import Unfused
from qatlib.analysis.units import Unit
from qatlib.fake.coverage import Coverage
from qatlib.fake.formats import FormatRow
from qatlib.fake.ranges import Range
from qatlib.pipeline.config import Goal
from qatlib.qtype import FLOAT, QType

INT8 = QType("int8", 1 / 64)


def comparison(noise: float, qtype: QType = INT8, count: int = 20_000) -> Comparison:
    """Comparison of bell-shaped codes of deviation 0.5 with themselves plus uniform noise of that width."""
    torch.manual_seed(0)
    reference = torch.round(torch.randn(count) * 32).clamp(-127, 127) / 64
    running = RunningComparison(qtype)
    running.add(reference, reference + (torch.rand(count) - 0.5) * noise)
    result = running.result()
    assert result is not None
    return result


def record(index: int, name: str, op: str, inputs: tuple[str, ...], spread: float = 1.0, **changes: Any) -> OpRecord:
    """A healthy op: codes equal, reference range about ``spread``."""
    summary = RunningSummary()
    summary.add(torch.linspace(-spread, spread, 101))
    base = OpRecord(
        index=index,
        name=name,
        module=name if op != "quantize" else "",
        module_type="torch.nn." + op,
        op=op,
        inputs=inputs,
        qtype=QType("int8", spread / 64),
        reference=summary.result(),
        other=summary.result(),
        accumulated=comparison(1e-3),
        same_input=comparison(1e-3),
    )
    return replace(base, **changes)


def records(mode: Mode = "FvsQ", **changes: dict[str, Any]) -> Capture:
    """quantize → conv1 → conv2 → cat(conv1, conv2) → fc; ``changes`` replaces fields of named records."""
    made = [
        record(0, "x_quant", "quantize", ("x",)),
        record(1, "conv1", "conv", ("x_quant",)),
        record(2, "conv2", "conv", ("conv1",), spread=2.0),
        record(3, "join", "cat", ("conv1", "conv2"), spread=3.0),
        record(4, "fc", "linear", ("join",), qtype=FLOAT, same_input=comparison(1e-3, FLOAT)),
    ]
    return Capture(mode, 2, 128, tuple(replace(r, **changes.get(r.name, {})) for r in made))


def op(name: str, kind: str = "conv", **changes: Any) -> OpFact:
    base = OpFact(
        name=name,
        module=name,
        kind=kind,
        dtype="int8",
        scale=1 / 64,
        inputs=("x.quant",),
        input_scales=(1 / 128,),
        acc_bound=100_000,
        weight=WeightFact(8, (), tuple(0.01 + 0.001 * c for c in range(8))),
    )
    return replace(base, **changes)


def span(name: str, held: float = 1.0) -> Range:
    """An activation calibrated on [-1, 1], and of ``held`` on held-out data."""
    return Range(name, "int8", "percentile", 1.0, 1 / 127.5, -1.0, 1.0, -held, held, 40.0)


UNITS = tuple(Unit(name, (name,), "Conv2d") for name in ("stem", "conv1", "conv2", "conv3", "conv4", "conv5", "fc"))


def distance(noise: float) -> Distance:
    return Distance(noise, noise, 1.0 - noise / 2)


def study(noise: float = 1e-3, conversion: float = 1e-5, case: float = 3e-3, **shares: float) -> Study:
    """64 samples, of noise ``noise`` at the outputs but one of ``case``, of which ops of ``shares`` make those parts.

    16 bits bring back all of it. Integers add the noise ``conversion``, of which conv2 makes 95 %.
    """
    trials = []
    for unit in UNITS:
        share = shares.get(unit.name, 1 / len(UNITS))
        seen = distance(noise * (1 - share))
        trials += [Trial(unit, "off", "all", seen, share), Trial(unit, "int16", "activation", seen, share)]
    lost = ConversionLoss(
        whole=distance(conversion),
        fake_metric=None,
        trials=tuple(IntegerTrial(u, distance(conversion * s), s) for u in UNITS for s in [0.95 * (u.name == "conv2")]),
        smallest=(UNITS[2],),
        explained=0.95,
        preserved=distance(0.05 * conversion),
        samples=64,
    )
    worst = BadCase(11, case, (), case / (case + 63 * 1e-3))
    return Study(
        Sensitivity(distance(noise), None, tuple(trials), 64, dict.fromkeys((u.name for u in UNITS), 1.0)),
        conversion=lost,
        bad_cases=(("FvsQ", BadCases((worst,), 1e-3, 64)),),
    )


CLEAN = Facts(
    metrics={
        "float": {"accuracy": 0.93, "images": 10_000, "train_accuracy": 0.95, "train_val_gap": 0.02},
        "calib": {
            "accuracy": 0.9285,
            "images": 10_000,
            "calibration_images": 2048,
            "held_out_median_range": 0.95,
        },
        "qat": {
            "accuracy": 0.9291,
            "images": 10_000,
            "epochs": 3,
            "best_epoch": 2,
            "last_epoch_gain": -0.0001,
            "val_integer": 0.93,
            "nan_rewinds": 0,
            "first_loss": 0.25,
            "first_loss_calibrated": 0.24,
            "first_loss_float": 0.2,
        },
        "integer": {"accuracy": 0.929, "images": 10_000},
        "compiled": {"accuracy": 0.929, "images": 10_000, "refused_ops": 0},
    },
    goals=(Goal(metric="ratio.calib", min=0.99), Goal(metric="ratio.integer", min=0.99)),
    state="VALIDATION",
    floor=0.9,
    inputs=(InputFact("x", -1.0, 1.0, 0.0, "int8", 1 / 128),),
    fvsq=records(),
    qvsq=records("QvsQ"),
    ops=(op("conv1"), op("conv2", inputs=("conv1",)), op("fc", "linear", dtype="int32", scale=None, is_output=True)),
    ranges=tuple(span(f"conv{k}") for k in range(20)),
    study=study(),
)


def scored(**values: float) -> dict[str, Any]:
    """CLEAN's metrics with other scores, e.g. ``calib=0.5``; None-like stages are left out by passing nan."""
    metrics = {stage: dict(numbers) for stage, numbers in CLEAN.metrics.items()}
    for stage, value in values.items():
        metrics[stage]["accuracy"] = value
    return {"metrics": metrics}


# -- faults ----------------------------------------------------------------------------------------------------------


def input_of(low: float, high: float, scale: float | None = 1 / 128, dtype: str = "int8") -> dict[str, Any]:
    return {"inputs": (InputFact("x", low, high, (low + high) / 2, dtype, scale),)}


def extra(**metrics: float) -> dict[str, Any]:
    """CLEAN's metrics with keys such as ``float__train_val_gap`` replaced."""
    changed = {stage: dict(numbers) for stage, numbers in CLEAN.metrics.items()}
    for path, value in metrics.items():
        stage, key = path.split("__")
        changed[stage][key] = value
    return {"metrics": changed}


WIDE_ADD = Capture(
    "FvsQ",
    1,
    1,
    (record(0, "a", "conv", ("x",)), record(1, "b", "conv", ("a",), spread=100.0), record(2, "sum", "add", ("a", "b"))),
)
COARSE, COARSER = comparison(0.2), comparison(0.4)
DEAD = WeightFact(8, (2, 5), (0.01,) * 8)
OUTLIER = WeightFact(8, (), (0.01,) * 6 + (1.0, 0.01))

OVER = 2**31
CUT = Saturation("conv2", OVER, OVER + 5, 7, 1000)
STEEP = TableFact("exp", "int16", "uniform", 1, 513, 9.5, 0.3)

BN = Unfused("bn", "BatchNorm2d", "batch norm", "conv1", "Conv2d + BatchNorm2d", "readers", "seen", "Do this", "m.py:3")

UNLIKE = (0.0, *(0.1,) * 6, 2.0)
"""Largest values of channels; a code of conv2 is 2/64."""


def fmt(op: str, **changes: Any) -> FormatRow:
    """A row of the qconfig table: an int8 convolution."""
    row = FormatRow(op, "Conv2d", "conv", "", "int8", "int8", "percentile", 1 / 64, "qconfig.default", "int8", 0, 8.0,
                    "qconfig.default", "")  # fmt: skip
    return replace(row, **changes)


FIXED = fmt("conv1", observer="fixed", scale=1 / 512, output_rule="qconfig.overrides[0]")
MEETS = fmt("join", kind="cat", inputs="int16, int8", weight="", weight_axis=None, weight_bits=None, weight_rule="")


def sites(*largest: float) -> tuple[CallSite, ...]:
    """Calls of conv1 and conv2 by a module ``c``."""
    ops = ("conv1", "conv2")
    pairs = enumerate(zip(ops, largest, strict=True), 1)
    return tuple(
        CallSite("c", "Conv2d", 2, k, op, -1.0, 1.0, -x, x, x / 64, x / max(largest), 9) for k, (op, x) in pairs
    )


ONE_SCALE = tuple(
    fmt(op, observer="fixed", scale=1 / 64, output_rule="qconfig.overrides[0]") for op in ("conv1", "conv2")
)

PLANTED: list[tuple[str, str, str, dict[str, Any]]] = [
    ("QAT001", "error", "", scored(calib=0.70, qat=0.93)),
    ("QAT002", "info", "", scored(calib=0.90)),
    ("QAT003", "error", "", {"state": "CALIBRATION"}),
    ("QAT003", "warning", "", {"state": None, **scored(calib=0.93)}),
    ("QAT004", "error", "conv1", {**scored(integer=0.85, compiled=0.85), "qvsq": records("QvsQ")}),
    ("QAT005", "warning", "x", input_of(0.0, 1.0)),
    ("QAT005", "warning", "x", input_of(0.0, 255.0, 2.0)),
    ("QAT005", "warning", "x", input_of(-3.0, 3.0, 3 / 128)),
    ("QAT006", "info", "x", input_of(-1.0, 1.0, 0.02)),
    ("QAT007", "warning", "fc", {"ops": (op("fc", "linear", is_output=True),)}),
    ("QAT008", "warning", "conv2", {"fvsq": records(conv2={"same_input": COARSE})}),
    ("QAT009", "warning", "join", {"fvsq": records(conv1={"reference": record(0, "", "", (), 1e-2).reference})}),
    ("QAT009", "info", "sum", {"fvsq": WIDE_ADD}),
    ("QAT009", "warning", "j", {"fvsq": None, "ops": (op("j", "cat", inputs=("a", "b"), input_scales=(0.5, 0.01)),)}),
    ("QAT010", "info", "conv2", {"ops": (op("conv1"), op("conv2", weight=DEAD))}),
    ("QAT010", "error", "conv2", {"ops": (op("conv2", weight=WeightFact(2, (0, 1))),)}),
    ("QAT011", "info", "conv2", {"ops": (op("conv1"), op("conv2", weight=OUTLIER))}),
    ("QAT012", "error", "", {"floor": 0.95}),
    ("QAT013", "warning", "", extra(float__train_val_gap=0.2)),
    ("QAT014", "warning", "conv2", {"ops": (op("conv1"), op("conv2", inputs=("conv1",), acc_bound=2**31))}),
    (
        "QAT014",
        "info",
        "conv2",
        {
            "ops": (op("conv2", acc_bound=OVER),),
            "qvsq": replace(records("QvsQ"), saturations=(Saturation("conv2", OVER, 99, 0, 1000),)),
        },
    ),
    ("QAT015", "error", "conv2", {"qvsq": records("QvsQ", conv2={"same_input": comparison(0.1)})}),
    ("QAT016", "warning", "", scored(qat=0.92, integer=0.92, compiled=0.92)),
    ("QAT017", "error", "", scored(compiled=0.9289)),
    ("QAT018", "info", "", extra(integer__images=500)),
    ("QAT019", "warning", "fc", {"fvsq": records(fc={"accumulated": replace(comparison(1e-3), dot=-1.0)})}),
    ("QAT020", "error", "", extra(compiled__refused_ops=2)),
    ("QAT021", "warning", "", {"coverage": Coverage(100, 89, {"a": 89, "b": 11}, ("b",))}),
    ("QAT021", "error", "", {"coverage": Coverage(100, 0, {"a": 100}, ("a",))}),
    (
        "QAT022",
        "error",
        "conv2",
        {"ops": (op("conv2", acc_bound=OVER),), "qvsq": replace(records("QvsQ"), saturations=(CUT,))},
    ),
    ("QAT023", "warning", "act.exp", {"ops": (op("act.exp", "table", module="act", weight=None, table=STEEP),)}),
    ("QAT025", "info", "c", {"shared": sites(0.4, 2.0)}),
    ("QAT025", "warning", "c", {"shared": sites(0.4, 2.0), "formats": ONE_SCALE}),
    ("QAT026", "warning", "bn", {"unfused": (BN,)}),
    ("QAT027", "warning", "conv1", {"formats": (FIXED,)}),
    ("QAT034", "warning", "join", {"formats": (fmt("conv1"), MEETS)}),
    ("QAT035", "warning", "conv2", {"formats": (fmt("conv2", weight="int16", weight_bits=6.0),)}),
    ("QAT028", "warning", "", extra(qat__nan_rewinds=2)),
    ("QAT029", "warning", "", extra(qat__first_loss=2.0, qat__first_loss_calibrated=1.9)),
    ("QAT029", "warning", "", extra(qat__first_loss=2.0)),
    ("QAT030", "info", "", extra(qat__best_epoch=3, qat__last_epoch_gain=0.01)),
    ("QAT031", "info", "", extra(qat__best_epoch=0)),
    ("QAT031", "warning", "", {"goals": (Goal(metric="ratio.integer", min=0.9999),), **extra(qat__best_epoch=0)}),
    ("QAT032", "info", "", extra(calib__calibration_images=64)),
    ("QAT033", "info", "c", {"ranges": (*CLEAN.ranges, span("b", 1.2), span("c", 1.5))}),
    ("QAT033", "warning", "c", {"ranges": (span("a"), span("b", 1.2), span("c", 1.5))}),
    ("QAT033", "warning", "", extra(calib__held_out_median_range=0.01)),
    ("QAT036", "info", "conv3", {"study": study(noise=0.02, conv3=0.6)}),
    ("QAT037", "warning", "conv2", {"study": study(conversion=6e-4)}),
    ("QAT038", "warning", "", {"study": study(case=0.3)}),
    ("QAT039", "warning", "conv2", {"fvsq": records(conv2={"channel_amax": UNLIKE}), "equalizable": ("conv2",)}),
    ("QAT024", "info", "gate", {"ops": (op("gate", "table", weight=None, is_output=True),)}),
]
