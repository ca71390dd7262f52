"""Facts without a fault, and builders that plant one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qatlib.analysis.bad_case import BadCase, BadCases
from qatlib.analysis.conversion_loss import ConversionLoss, IntegerTrial
from qatlib.analysis.distance import Distance
from qatlib.analysis.facts import Facts, InputFact
from qatlib.analysis.op_facts import OpFact, WeightFact
from qatlib.analysis.records import Capture, Mode, OpRecord
from qatlib.analysis.sensitivity import Sensitivity, Trial
from qatlib.analysis.stats import Comparison, RunningComparison, RunningSummary
from qatlib.analysis.study import Study
from qatlib.analysis.units import Unit
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
