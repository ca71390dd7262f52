"""Pages to open: of a small net with everything in it, and of a deep one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from qatlib.analysis.call_sites import shared_calls
from qatlib.analysis.findings import Finding, Found
from qatlib.analysis.op_facts import program_facts
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.records import Capture, Mode, OpRecord
from qatlib.analysis.report import ReportData
from qatlib.analysis.stats import BINS
from qatlib.analysis.summary import build_summary, goal_results
from qatlib.conversion import convert_fx
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import prepare_qat_fx
from tests.analysis.planted import CLEAN, record, scored


class Calls(nn.Module):
    """Two modules called several times, a composite, a table, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.GELU()
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.act(self.stem(x))
        b = self.down(a)
        c = self.down(b)
        n = self.norm(c.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(a), self.head(b), self.head(n * torch.sigmoid(c))


def small() -> ReportData:
    """Inputs reach 1.5 times as far as those of calibration, so that formats cut off."""
    torch.manual_seed(0)
    net, x = Calls().eval(), torch.randn(4, 3, 16, 16)
    fake = prepare_qat_fx(net, example_inputs=(x,))
    calibrate(fake, (x,))
    integer = convert_fx(fake)
    captures = capture_pair(net, fake, [1.5 * x], "FvsQ"), capture_pair(fake, integer, [1.5 * x], "QvsQ")
    facts = replace(CLEAN, **scored(calib=0.9))
    summary = build_summary(facts, [])
    findings = (
        Finding("QAT001", "error", "Calibration loses much", "", {"ratio": 0.7}),
        Finding("QAT008", "warning", "Large error of its own", "down (call 2)", {"sqnr_db": 20.0}, "a: 1", "dvc x"),
        Finding("QAT010", "info", "Dead channels", "stem", {"dead": 2}),
        Finding("QAT011", "info", "An outlier", "norm", {"ratio": 40.0}),
        Finding("QAT011", "info", "An outlier", "head", {"ratio": 50.0}),
    )
    return ReportData(
        Found(findings),
        captures,
        summary,
        goal_results(summary, facts),
        ops=program_facts(integer.program),
        study=CLEAN.study,
        calls=shared_calls(captures[0], fake.graph),
    )


def deep(ops: int = 300) -> ReportData:
    """Residual blocks of three, counts of seven digits in every bin: more than a real network has."""
    rng = np.random.default_rng(0)
    return ReportData(captures=(_deep("FvsQ", ops, rng), _deep("QvsQ", ops, rng)))


def _deep(mode: Mode, ops: int, rng: np.random.Generator) -> Capture:
    base, made = record(0, "", "conv", ()), list[OpRecord]()
    assert base.accumulated is not None
    for i in range(ops):
        names = [f"features.layer{j // 12}.block{j % 12 // 3}.conv{j % 3}" for j in (i, i - 1, i - 3)]
        rows = [tuple(int(n) for n in rng.integers(10**6, 10**7, BINS)) for _ in range(2)]
        noise = float(base.accumulated.ref_sq) / 10 ** rng.uniform(0.5, 5.0)
        seen = replace(base.accumulated, se=noise, histograms=(rows[0], rows[1]), count=sum(rows[0]))
        inputs = tuple(names[1 : 3 if i > 2 and i % 3 == 0 else 2]) if i else ("x",)
        made.append(replace(base, index=i, name=names[0], module=names[0], inputs=inputs,
                            accumulated=seen, same_input=seen))  # fmt: skip
    return Capture(mode, 8, 512, tuple(made))
