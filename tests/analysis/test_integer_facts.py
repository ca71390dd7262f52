"""What analysis says of accumulators and tables of a real Program, against figures computed here."""

from __future__ import annotations

import copy
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from qatlib.analysis import publish
from qatlib.analysis.accumulators import sums
from qatlib.analysis.facts import Facts
from qatlib.analysis.op_facts import program_facts
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.report import ReportData, render
from qatlib.analysis.report.sections import inner_steps
from qatlib.analysis.rules import run_rules
from qatlib.conversion import to_program
from qatlib.emulator import Emulator
from qatlib.fake.model import set_fake_quantize
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.fake.state import FakeQuantState
from qatlib.pipeline.config import TableParams
from qatlib.program import Op
from qatlib.qtype import INT32 as QINT32
from tests.analysis.planted import CLEAN
from tests.kind_nets import IDS, NETS
from tests.models import calibrated, model

INT16 = get_default_qconfig("int16", "min_max")
INT32 = (-(2**31), 2**31 - 1)


def test_saturated_sums_are_counted_on_the_data() -> None:
    """1,000 products of int16 codes near the top by weights near the top: three of four samples pass 2^31."""
    net = model(lambda s, x: s.fc(x) * 0.5, fc=nn.Linear(1000, 2))
    with torch.no_grad():
        net.fc.weight.copy_(torch.stack([torch.ones(1000), torch.linspace(-1, 1, 1000)]))
    x = torch.tensor([1.0, -0.9, 0.8, 0.1]).view(4, 1).expand(4, 1000).contiguous()
    fake = calibrated(net, x, qconfig_dict=INT16)
    program = to_program(fake)
    seen = capture_pair(fake, program, [x[:3], x[3:]], "QvsQ")
    fc = next(op for op in program if op.name == "fc")
    codes = Emulator(program).trace(x)["x.quant"].numpy().astype(np.int64)
    weight, bias = (program.constant(fc, role).numpy().astype(np.int64) for role in ("weight", "bias"))
    acc = codes @ weight.T + bias
    (found,) = seen.saturations
    assert (found.name, found.bound, found.elements) == ("fc", fc.attrs["acc_bound"], 8)
    assert found.largest == np.abs(acc).max() > INT32[1]
    assert found.saturated == ((acc < INT32[0]) | (acc > INT32[1])).sum() == 3
    (finding,) = (f for f in run_rules(Facts(qvsq=seen, ops=program_facts(program))) if f.code == "QAT022")
    assert finding.module == "fc"
    assert finding.evidence["largest_seen"] == found.largest


@pytest.mark.parametrize("name", ["encoder and decoder", "attention", "transformer block", "masks"])
def test_sums_are_those_that_the_kernels_requantize(name: str) -> None:
    """Requantized by the op's own factors they give the op's own output."""
    net = NETS[name]
    program = net.program()
    emulator, met = Emulator(program), set()

    def visit(op: Op, given: tuple[Tensor, ...], output: Tensor) -> None:
        if "acc_bound" not in op.attrs:
            return
        acc = sums(op, program, given).clamp(*INT32)
        if "multiplier" in op.consts:
            m, n = (program.constant(op, role).double() for role in ("multiplier", "shift"))
            if op.kind in ("conv", "conv_transpose"):
                m, n = m.view(-1, 1, 1), n.view(-1, 1, 1)
            total = acc * m
            if "addend_multiplier" in op.consts:
                total = total + given[1].double() * program.constant(op, "addend_multiplier").double()
            acc = (total * torch.exp2(-n)).round().clamp(op.attrs["lo"], op.attrs["hi"])
        met.add(op.kind)
        assert int((acc != output.double()).sum()) == 0, op.name

    emulator.walk(*net.inputs, visit=visit)
    assert met >= net.kinds & {"conv", "conv_transpose", "linear", "matmul", "sum"}


def test_the_edit_of_a_steep_table_makes_it_finer() -> None:
    net = model(lambda s, x: torch.sin(s.fc(x) * 50), fc=nn.Linear(16, 8))
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    fake = calibrated(net, x, qconfig_dict=INT16)
    before = program_facts(to_program(fake))
    (finding,) = (f for f in run_rules(Facts(ops=before)) if f.code == "QAT023")
    (record,) = YAML(typ="safe").load(finding.edit)["convert"]["tables"]
    spec = TableParams.model_validate(record).spec
    after = program_facts(to_program(fake, tables={record["match"]: spec}))
    (old,), (new,) = ([op.table for op in facts if op.table] for facts in (before, after))
    assert old.worst_lsb > 2
    assert new.worst_lsb < old.worst_lsb / 2


def test_tables_are_listed_worst_first(tmp_path: Path) -> None:
    program = NETS["transformer block"].program()
    publish(replace(CLEAN, ops=program_facts(program)), tmp_path)
    with (tmp_path / "tables.csv").open() as file:
        rows = list(csv.DictReader(file))
    stored = {op.name: op.attrs["table"] for op in program if op.kind == "table"}
    assert {row["Op"] for row in rows} == set(stored)
    assert [float(row["Worst LSB"]) for row in rows] == sorted((float(r["Worst LSB"]) for r in rows), reverse=True)
    for row in rows:
        assert int(row["Entries"]) == stored[row["Op"]]["entries"]
        assert float(row["Mean LSB"]) == pytest.approx(stored[row["Op"]]["mean_lsb"], rel=1e-5)
    page = (tmp_path / "profiler.html").read_text()
    assert 'id="tables"' in page
    assert all(f">{name}<" in page for name in stored)


@pytest.mark.parametrize("name", NETS)
def test_every_kind_is_measured_and_shown_by_a_name_of_its_own(name: str) -> None:
    net = NETS[name]
    fake = net.prepared()
    program = to_program(fake)
    view = copy.deepcopy(fake)
    set_fake_quantize(view, FakeQuantState.CALIBRATION)
    fvsq = capture_pair(view, fake, [net.inputs], "FvsQ")
    qvsq = capture_pair(fake, program, [net.inputs], "QvsQ")
    for seen in (fvsq, qvsq):
        titles = [record.title for record in seen.records]
        assert len(set(titles)) == len(titles)
        missing = {item.name for item in seen.unmeasured if item.what == "accumulated error"}
        assert missing <= {r.name for r in seen.records if r.name not in program.values}
    accumulators = {op.inputs[0] for op in program if op.kind == "dequantize"}
    for record in qvsq.records:
        if record.same_input is not None and record.qtype == QINT32 and record.name not in accumulators:
            assert record.same_input.max_abs == 0, f"{record.name} are integers, which neither side rounds"


def test_ids_are_numbers_without_a_scale() -> None:
    fake = NETS["embedding of ids"].prepared()
    seen = capture_pair(fake, to_program(fake), [(IDS,)], "QvsQ")
    table = seen.find("table")
    assert table is not None
    assert table.same_input is not None
    assert table.same_input.max_lsb == 0


def test_the_steps_of_a_composite_are_folded_behind_its_last() -> None:
    """The rows of an unrolled recurrence: one is open at first, and each step has the name of its own."""
    fake = NETS["gru"].prepared()
    seen = capture_pair(fake, to_program(fake), [NETS["gru"].inputs], "QvsQ")
    steps = [record for record in seen.records if record.composite == "gru"]
    folded = [r.name for r, inner in zip(seen.records, inner_steps(seen), strict=True) if inner]
    assert len(steps) > 50
    assert folded == [record.name for record in steps[:-1]]
    assert {record.title for record in steps} == {record.name for record in steps}
    page = render(ReportData(captures=(seen,)))
    assert page.count(' class="step">') == len(folded)
    assert f"Show the {len(folded)} inner steps of composites" in page


def test_the_calls_of_a_shared_composite_are_numbered_and_a_step_is_named_for_params() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    fake = calibrated(model(lambda s, x: s.norm(s.fc(s.norm(x))), norm=nn.LayerNorm(6), fc=nn.Linear(6, 6)), x)
    seen = capture_pair(fake, to_program(fake), [(x,)], "QvsQ")
    calls = {record.name: (record.call, record.match) for record in seen.records if record.module == "norm"}
    assert calls["norm.mean"] == (1, "norm#0.mean"), "norm.mean would mean the step of both calls"
    assert calls["norm#1.mean"] == (2, "norm#1.mean")
    assert {number for number, _ in calls.values()} == {1, 2}
    fc = seen.find("fc")
    assert fc is not None
    assert (fc.call, fc.match, fc.title) == (0, "fc", "fc")
