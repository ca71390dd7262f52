"""Calls of shared modules: a row each with the ranges of the float model, also of what was fused; rule QAT025."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.analysis.call_sites import CallSite, shared_calls, write_shared
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.profiler import capture_pair, model_profiler
from qatlib.analysis.rules import run_rules
from qatlib.fake.formats import format_rows
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import QConfig
from qatlib.fake.stubs import QuantStub
from tests.models import calibrated, images, model


def net(factor: float = 16.0) -> nn.Module:
    """A convolution with batch norm, called on a value and on that value times ``factor``; a relu behind three ops."""
    torch.manual_seed(0)
    return model(
        lambda s, x: s.act(s.bn(s.c(x))) + s.act(s.bn(s.c(x * factor))) + s.act(s.other(x)),
        c=nn.Conv2d(3, 4, 1, bias=False),
        bn=nn.BatchNorm2d(4),
        act=nn.ReLU(),
        other=nn.Conv2d(3, 4, 1),
    )


X = images(4, 3, 8)


def sites(made: nn.Module, fake: FakeQuantModel) -> tuple[CallSite, ...]:
    return shared_calls(capture_pair(made, fake, X, "FvsQ"), fake.graph)


def found(made: nn.Module, fake: FakeQuantModel) -> list[Finding]:
    seen = capture_pair(made, fake, X, "FvsQ")
    facts = Facts(fvsq=seen, formats=tuple(format_rows(fake)), shared=shared_calls(seen, fake.graph))
    return [finding for finding in run_rules(facts) if finding.code == "QAT025"]


def largest(made: nn.Module, x: Tensor) -> tuple[float, float]:
    with torch.no_grad():
        out = F.relu(made.bn(made.c(x)))  # type: ignore[operator]
    return float(out.min()), float(out.max())


def test_a_row_per_call_with_ranges_scale_and_ratio() -> None:
    made = net()
    fake = calibrated(made, X)
    rows = sites(made, fake)
    assert [(r.module, r.call, r.calls, r.op) for r in rows] == [
        ("c", 1, 2, "c"), ("bn", 1, 2, "c"), ("act", 1, 3, "c"),
        ("c", 2, 2, "c#1"), ("bn", 2, 2, "c#1"), ("act", 2, 3, "c#1"), ("act", 3, 3, "other"),
    ]  # fmt: skip
    first, second = (next(r for r in rows if (r.module, r.call) == ("c", k)) for k in (1, 2))
    assert (first.input_min, first.input_max) == (float(X.min()), float(X.max()))
    assert (second.input_min, second.input_max) == pytest.approx((float(X.min()) * 16, float(X.max()) * 16))
    assert (first.output_min, first.output_max) == pytest.approx(largest(made, X), rel=1e-4, abs=1e-6)
    assert (second.output_min, second.output_max) == pytest.approx(largest(made, X * 16), rel=1e-4, abs=1e-6)
    assert [first.scale, second.scale] == [fake.qtype(name).scale for name in ("c", "c#1")]
    assert second.ratio == 1.0
    assert first.ratio == pytest.approx(largest(made, X)[1] / largest(made, X * 16)[1], rel=1e-4)
    assert first.parameters == 12 + 4, "the weights, and the bias that the batch norm leaves"
    assert next(r for r in rows if r.module == "act").parameters == 0


def test_a_model_without_shared_modules_has_no_rows(tmp_path: Path) -> None:
    made = model(lambda s, x: s.b(F.relu(s.a(x))) + F.relu(x), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    rows = sites(made, calibrated(made, X))
    assert rows == ()
    write_shared(rows, tmp_path / "shared.csv")
    assert (tmp_path / "shared.csv").read_text().startswith("module,type,calls,call,op,input_min")


def test_a_composite_is_one_call() -> None:
    made = model(lambda s, x: s.norm(x) + s.norm(x * 3), norm=nn.LayerNorm(8))
    rows = sites(made, calibrated(made, X))
    assert [(r.module, r.call, r.calls) for r in rows] == [("norm", 1, 2), ("norm", 2, 2)]
    with torch.no_grad():
        assert rows[0].output_max == pytest.approx(float(made.norm(X).max()), rel=1e-4)  # type: ignore[operator]
    assert rows[1].input_max == pytest.approx(float(X.max()) * 3)


def test_calls_with_scales_of_their_own_are_a_remark() -> None:
    made = net()
    findings = {finding.module: finding for finding in found(made, calibrated(made, X))}
    assert list(findings) == ["act", "c"], "the widest ratio first; what is fused into c is told once"
    finding = findings["c"]
    assert finding.severity == "info"
    ratio = largest(made, X * 16)[1] / largest(made, X)[1]
    assert finding.evidence["ratio"] == pytest.approx(ratio, rel=1e-4)
    assert finding.evidence["bits"] == pytest.approx(math.log2(ratio), rel=1e-4)
    assert finding.edit == "model:\n  unshare: ['c']"


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.5])
def test_calls_of_like_ranges_are_no_finding(factor: float) -> None:
    made = net(factor)
    assert found(made, calibrated(made, X)) == []


def test_calls_that_pass_on_a_format_are_no_finding() -> None:
    made = model(lambda s, x: s.pool(x) + s.pool(x * 16), pool=nn.MaxPool2d(2))
    assert len(sites(made, calibrated(made, X))) == 2
    assert found(made, calibrated(made, X)) == []


def test_a_stub_with_one_scale_for_two_inputs_is_a_warning() -> None:
    class Two(nn.Module):
        def __init__(self, scale: float | None) -> None:
            super().__init__()
            self.quant, self.c = QuantStub(scale), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(self.quant(x) + self.quant(y))

    x, y = images(2, 3, 8).clamp(-1, 1), images(2, 3, 8, seed=2).clamp(-1, 1) / 6
    for scale, severity in ((1 / 128, "warning"), (None, "info")):
        made = Two(scale).eval()
        fake = calibrated(made, x, y)
        seen = capture_pair(made, fake, (x, y), "FvsQ")
        facts = Facts(fvsq=seen, formats=tuple(format_rows(fake)), shared=shared_calls(seen, fake.graph))
        (finding,) = [f for f in run_rules(facts) if f.code == "QAT025"]
        assert (finding.module, finding.severity) == ("quant", severity)
        assert finding.evidence["ratio"] == pytest.approx(6.0, rel=1e-3)


def test_a_fixed_scale_by_name_is_a_warning_with_a_scale_for_the_narrow_call() -> None:
    made = net(6.0)
    end = largest(made, X * 6)[1]
    fake = calibrated(
        made, X, qconfig_dict={"": QConfig(), "module_name": {"c": QConfig().with_activation(scale=end / 128)}}
    )
    seen = capture_pair(made, fake, X, "FvsQ")
    rows = tuple(format_rows(fake))
    assert [row.scale for row in rows if row.op in ("c", "c#1")] == pytest.approx([end / 128] * 2)
    finding = found(made, fake)[0]
    assert finding.severity == "warning"
    assert "call 1 loses" in finding.title
    assert seen.find("c").match == "c#0"  # type: ignore[union-attr]


def test_model_profiler_writes_the_table(tmp_path: Path) -> None:
    made = net()
    fake = calibrated(made, X)
    findings = model_profiler(made, fake, X, "FvsQ", tmp_path)
    assert "QAT025" in {finding.code for finding in findings}
    rows = list(csv.DictReader((tmp_path / "shared.csv").open()))
    assert [(row["module"], row["call"]) for row in rows[:2]] == [("c", "1"), ("bn", "1")]
    assert (tmp_path / "statistics-FvsQ-by-range.csv").is_file()
