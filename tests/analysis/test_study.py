"""Findings, tables and page of a study: planted faults by name, predictions against the edited model."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor

from qatlib.analysis.bad_case import find_bad_case
from qatlib.analysis.conversion_loss import bisect_conversion
from qatlib.analysis.findings import Finding, Found, parse_findings
from qatlib.analysis.report import ReportData, render
from qatlib.analysis.rules import run_rules
from qatlib.analysis.sensitivity import sensitivity
from qatlib.analysis.steps import step_quantization
from qatlib.analysis.study import Study, write_study
from qatlib.analysis.study_view import show
from qatlib.conversion import to_program
from qatlib.fake.calibrate import calibrate
from qatlib.fake.float_form import float_form
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import default_calib_8bit_weight_16bit_act_fake_quant_qconfig as INT16
from tests.analysis.analysis_nets import Net, Trio, quantized
from tests.analysis.planted import CLEAN, scored
from tests.analysis.test_sensitivity import noise_of, wide_channel
from tests.kind_nets import NETS
from tests.models import calibrated, everything, images

MISSED = scored(qat=0.9)
"""The fake-quant model scores 97 % of float."""


def found(study: Study, code: str, **facts: Any) -> list[Finding]:
    return [f for f in run_rules(replace(CLEAN, study=study, **facts)) if f.code == code]


@pytest.fixture(scope="module")
def wide() -> Study:
    """One channel of ``each1`` is fifty times as wide as the others."""
    data = images(16, size=8)
    return Study(sensitivity(calibrated(wide_channel(), data), data))


@pytest.fixture(scope="module")
def whole(trio: Trio) -> Study:
    """Every part of a study of a sound network."""
    data = list(trio.batches)
    bad = find_bad_case(trio.float_model, trio.fake, data, "FvsQ"), find_bad_case(trio.fake, trio.integer, data, "QvsQ")
    return Study(
        sensitivity(trio.fake, data),
        step_quantization(trio.fake, data),
        bisect_conversion(trio.fake, trio.integer, data),
        tuple(zip(("FvsQ", "QvsQ"), bad, strict=True)),
    )


# -- one op ------------------------------------------------------------------------------------------------------------


def test_the_finding_has_the_edit_and_what_the_edit_then_gives(wide: Study) -> None:
    (one,) = found(wide, "QAT036", **MISSED)
    assert (one.module, one.severity) == ("each1", "warning")
    (record,) = YAML(typ="safe").load(one.edit)["qconfig"]["overrides"]
    assert record == {"match": "each1", "activation": "int16"}
    data, net = images(16, size=8), wide_channel()
    edited = prepare_qat_fx(net, {"module_name": {"each1": INT16}}, example_inputs=(data,))
    calibrate(edited, [data])
    measured = -10 * np.log10(noise_of(float_form(edited, data), edited(data).detach()))
    assert one.evidence["predicted_sqnr_db"] == pytest.approx(measured, abs=1e-6)
    gain = measured - wide.sensitivity.whole.sqnr_db
    assert one.predicted == {"output_sqnr_db": pytest.approx(gain, abs=1e-6)}
    document = json.loads(json.dumps(Found((one,)).document(), allow_nan=False))
    assert parse_findings(json.dumps(document)).findings == (one,)


def test_where_the_goal_is_met_only_a_loud_error_is_named(wide: Study) -> None:
    seen = wide.sensitivity
    for noise, codes in ((0.0101, ["each1"]), (0.0099, [])):  # 19.96 dB and 20.04 dB
        level = replace(seen, whole=replace(seen.whole, noise=noise))
        assert [f.module for f in found(Study(level), "QAT036")] == codes
    (one,) = found(Study(replace(seen, whole=replace(seen.whole, noise=0.1))), "QAT036")
    assert one.severity == "info"


@pytest.mark.parametrize(
    ("share", "missed", "named"), [(0.34, True, 1), (0.32, True, 0), (0.51, False, 1), (0.49, False, 0)]
)
def test_shares_that_are_causes(wide: Study, share: float, missed: bool, named: int) -> None:
    seen = wide.sensitivity
    trials = tuple(
        replace(t, share=share if t.unit.name == "each1" else 0.0)
        for t in seen.trials
        if (t.kind, t.part) == ("off", "all")
    )
    level = replace(seen, trials=trials, whole=replace(seen.whole, noise=0.1))
    assert len(found(Study(level), "QAT036", **(MISSED if missed else {}))) == named


def test_of_few_ops_the_largest_is_no_news(wide: Study) -> None:
    seen = wide.sensitivity
    few = replace(seen, scores=dict.fromkeys(["each1", "a", "b"], 0.0), whole=replace(seen.whole, noise=0.1))
    assert not found(Study(few), "QAT036")


def test_an_op_that_16_bits_do_not_help_is_left_in_float() -> None:
    data = images(16, size=8)
    study = Study(sensitivity(calibrated(wide_channel(), data), data, kinds=["on", "off"]))
    (one,) = found(study, "QAT036", hybrid=("stem",), **MISSED)
    assert YAML(typ="safe").load(one.edit) == {"qat": {"hybrid": ["stem", "each1"]}}
    assert one.command == "dvc exp run --temp -S \"qat.hybrid=['stem', 'each1']\""


# -- conversion --------------------------------------------------------------------------------------------------------


def test_ops_that_lose_in_conversion_are_preserved(whole: Study) -> None:
    """A sound conversion with another loss, of which the head makes most."""
    assert whole.conversion is not None
    lost, rounding = whole.conversion, whole.sensitivity.whole.noise
    head = next(t.unit for t in lost.trials if t.unit.name == "fc")

    def with_noise(ratio: float, left: float) -> Study:
        noise = ratio * rounding
        changed = replace(
            lost,
            whole=replace(lost.whole, noise=noise),
            smallest=(head,),
            preserved=replace(lost.preserved, noise=left * noise),
        )
        return replace(whole, conversion=changed)

    (one,) = found(with_noise(0.6, 0.1), "QAT037", preserve=("stem",))
    assert YAML(typ="safe").load(one.edit) == {"convert": {"preserve": ["stem", "fc"]}}
    assert one.evidence["ops"] == "fc"
    assert one.predicted == {"conversion_sqnr_db": pytest.approx(10.0)}, "a tenth of the noise is left"
    assert not found(with_noise(0.4, 0.1), "QAT037"), "an error below half of rounding's"
    assert not found(with_noise(0.6, 0.6), "QAT037"), "what stays without the op is not its doing"


# -- samples -----------------------------------------------------------------------------------------------------------


def cases_of(data: Tensor, seen: Tensor) -> Study:
    """FvsQ of :class:`Net` calibrated on ``data`` and shown ``seen``."""
    torch.manual_seed(0)
    net = Net().eval()
    fake = quantized(net, (data,))
    return Study(sensitivity(fake, seen), bad_cases=(("FvsQ", find_bad_case(net, fake, seen)),))


def test_a_sample_unlike_those_of_calibration_is_named() -> None:
    data = images(64, size=8)
    odd = data.clone()
    odd[17] *= 50
    (one,) = found(cases_of(data, odd), "QAT038")
    assert one.evidence["index"] == 17
    assert one.evidence["images"] == 64
    assert one.edit == "calibrate:\n  batches: 64"
    assert not found(cases_of(data, data), "QAT038")


def test_a_sample_whose_output_is_small_is_not_named(whole: Study) -> None:
    """Its noise is large for what it is divided by; its share of the error is that of any sample."""
    cases = whole.bad_cases[0][1]
    near_zero = replace(cases.worst[0], noise=1e6 * cases.median, share=1 / 64)
    of = replace(cases, worst=(near_zero,), samples=64)
    assert not found(replace(whole, bad_cases=(("FvsQ", of),)), "QAT038")
    far = replace(near_zero, share=0.5)
    assert found(replace(whole, bad_cases=(("FvsQ", replace(of, worst=(near_zero, far))),)), "QAT038")


def test_shares_of_the_error_are_numpys(trio: Trio) -> None:
    x = torch.cat(trio.batches)
    seen = find_bad_case(trio.float_model, trio.fake, x, count=len(x))
    error = ((trio.fake(x) - trio.float_model(x)).detach().double().numpy() ** 2).sum(1)
    assert {c.index: c.share for c in seen.worst} == pytest.approx(dict(enumerate(error / error.sum())), rel=1e-3)


# -- sound nets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NETS, "everything", "trio"])
def test_a_sound_network_has_no_finding(name: str, trio: Trio, request: pytest.FixtureRequest) -> None:
    if name == "trio":
        study = request.getfixturevalue("whole")
    else:
        fake, inputs = (
            (calibrated(everything(), images(64)), (images(64),))
            if name == "everything"
            else (NETS[name].prepared(), NETS[name].inputs)
        )
        integer = to_program(fake)
        study = Study(
            sensitivity(fake, inputs, parts=False),
            conversion=bisect_conversion(fake, integer, inputs),
            bad_cases=() if name != "everything" else (("QvsQ", find_bad_case(fake, integer, inputs, "QvsQ")),),
        )
    assert [f.code for f in run_rules(replace(CLEAN, study=study))] == []


# -- what is written ---------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_have_every_trial(whole: Study, tmp_path: Path) -> None:
    write_study(whole, tmp_path)
    seen = whole.sensitivity
    rows = read(tmp_path / "sensitivity.csv")
    assert list(rows[0]) == ["op", "type", "kind", "part", "sqnr_db", "mse", "cosine", "metric", "share", "score"]
    assert [row["op"] for row in rows[:2]] == ["(none)", "(all)"]
    assert len(rows) == 2 + len(seen.trials)
    for row, trial in zip(rows[2:], seen.trials, strict=True):
        assert (row["op"], row["kind"], row["part"]) == (trial.unit.name, trial.kind, trial.part)
        assert float(row["share"]) == pytest.approx(trial.share, rel=1e-5)
        assert row["metric"] == ""
    assert whole.steps is not None
    steps = read(tmp_path / "steps.csv")
    assert [row["k"] for row in steps] == [str(k) for k in range(len(whole.steps.steps) + 1)]
    assert float(steps[-1]["first_sqnr_db"]) == pytest.approx(seen.whole.sqnr_db, rel=1e-5)
    assert whole.conversion is not None
    lost = read(tmp_path / "conversion_loss.csv")
    few = {row["op"] for row in lost if row["smallest"] == "1"}
    assert few == {unit.name for unit in whole.conversion.smallest}
    cases = read(tmp_path / "bad_cases.csv")
    assert list(cases[0]) == ["mode", "index", "sqnr_db", "times_median", "share"]
    assert [row["mode"] for row in cases] == ["FvsQ"] * 5 + ["QvsQ"] * 5


def test_without_a_study_tables_are_headers_alone(tmp_path: Path) -> None:
    write_study(None, tmp_path)
    names = ["bad_cases.csv", "conversion_loss.csv", "sensitivity.csv", "steps.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(path.read_text().count("\n") == 1 for path in tmp_path.iterdir())


def test_the_page_has_a_table_of_each_part(whole: Study) -> None:
    page = render(ReportData(study=whole))
    for anchor in ("sensitivity", "steps", "conversion"):
        assert f'href="#{anchor}"' in page
        assert f'id="{anchor}"' in page
    assert f"{whole.sensitivity.whole.sqnr_db:.1f} dB" in page
    first = whole.sensitivity.ranked("off")[0]
    assert f"{first.share:.0%}</text>" in page
    alone = render(ReportData(study=Study(whole.sensitivity)))
    assert 'id="sensitivity"' in alone
    assert 'id="steps"' not in alone
    assert 'id="sensitivity"' not in render(ReportData())


def test_the_terminal_names_the_costliest_op_first(
    wide: Study, whole: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    show(wide)
    rows = [line for line in capsys.readouterr().out.splitlines() if "Conv2d" in line]
    assert "each1" in rows[0]
    show(whole)
    shown = capsys.readouterr().out
    assert whole.steps is not None
    step = whole.steps.steepest()
    assert step is not None
    assert f"steepest step: {step.unit.name}" in shown
    assert "worst samples, QvsQ:" in shown
