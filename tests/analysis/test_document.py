"""reports/analysis.json: every op with what was measured of it, legal JSON whatever was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qatlib.analysis import capture_pair, input_facts, program_facts, publish
from qatlib.analysis.document import SCHEMA_VERSION
from qatlib.analysis.facts import Facts
from qatlib.analysis.sensitivity import sensitivity
from qatlib.analysis.study import Study
from qatlib.fake.formats import format_rows
from tests.analysis.analysis_nets import Trio
from tests.analysis.planted import CLEAN, comparison, records


def strict(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture(scope="module")
def facts(trio: Trio) -> Facts:
    batches = list(trio.batches)
    fvsq = capture_pair(trio.float_model, trio.fake, batches, "FvsQ")
    return replace(
        CLEAN,
        fvsq=fvsq,
        qvsq=capture_pair(trio.fake, trio.integer, batches, "QvsQ"),
        inputs=input_facts(fvsq),
        ops=program_facts(trio.integer.program),
        formats=tuple(format_rows(trio.fake)),
        study=Study(sensitivity(trio.fake, batches)),
    )


def written(facts: Facts, folder: Path) -> dict[str, Any]:
    publish(facts, folder)
    document: dict[str, Any] = json.loads((folder / "analysis.json").read_text(), parse_constant=strict)
    return document


def test_every_op_of_every_capture_has_its_numbers(facts: Facts, trio: Trio, tmp_path: Path) -> None:
    document = written(facts, tmp_path)
    assert document["schema_version"] == SCHEMA_VERSION
    assert [(op["mode"], op["name"]) for op in document["ops"]] == [
        (mode, node.name) for mode in ("FvsQ", "QvsQ") for node in trio.fake.graph.nodes if node.op != "input"
    ]
    by_name = {op["name"]: op for op in document["ops"] if op["mode"] == "FvsQ"}
    with torch.no_grad():
        exact, rounded = (
            torch.cat([model(batch) for batch in trio.batches]).double().numpy()
            for model in (trio.float_model, trio.fake)
        )
    seen = by_name[trio.fake.graph.outputs[0]]
    assert seen["accumulated"]["mse"] == pytest.approx(np.mean((exact - rounded) ** 2), rel=1e-4)
    noise = np.sum((exact - rounded) ** 2) / np.sum(exact**2)
    assert seen["accumulated"]["sqnr_db"] == pytest.approx(-10 * np.log10(noise), abs=1e-3)
    assert seen["reference"]["min"] == pytest.approx(exact.min(), rel=1e-5)
    assert seen["reference"]["std"] == pytest.approx(exact.std(), rel=1e-4)
    for op in document["ops"]:
        qtype = trio.integer.program.values[op["name"]].qtype
        if op["mode"] == "QvsQ" and op["scale"] is not None:
            assert np.float32(op["scale"]) == np.float32(qtype.scale), op["name"]


def test_channels_are_summed_up(tmp_path: Path) -> None:
    amax = (0.0, 0.5, 1.0, 4.0)
    facts = replace(CLEAN, fvsq=records(conv2={"channel_amax": amax}), qvsq=None)
    ops = {op["name"]: op for op in written(facts, tmp_path)["ops"]}
    assert ops["conv2"]["channels"] == {"count": 4, "dead": 1, "median": 0.75, "largest": 4.0}
    assert ops["conv1"]["channels"] is None


def test_the_study_is_in_it(facts: Facts, tmp_path: Path) -> None:
    assert facts.study is not None
    seen = written(facts, tmp_path)["study"]["sensitivity"]
    assert len(seen["trials"]) == len(facts.study.sensitivity.trials)
    assert seen["whole"]["sqnr_db"] == pytest.approx(facts.study.sensitivity.whole.sqnr_db, rel=1e-5)
    assert written(replace(facts, study=None), tmp_path)["study"] is None


def test_what_is_not_finite_is_null_and_said(tmp_path: Path) -> None:
    capture = records(fc={"same_input": replace(comparison(1e-3), se=0.0)}, conv1={"same_input": None})
    ops = {op["name"]: op for op in written(replace(CLEAN, fvsq=capture, qvsq=None), tmp_path)["ops"]}
    assert math.isinf(capture.records[-1].same_input.sqnr_db)  # type: ignore[union-attr]
    assert (ops["fc"]["same_input"]["sqnr_db"], ops["fc"]["same_input"]["identical"]) == (None, True)
    assert ops["conv1"]["same_input"] is None


def test_findings_are_named_by_code_and_module(facts: Facts, tmp_path: Path) -> None:
    document = written(replace(facts, floor=0.99), tmp_path)
    found = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert found
    assert document["findings"] == [{key: one[key] for key in ("code", "severity", "module")} for one in found]


def test_the_same_facts_give_the_same_bytes_an_op_a_line(facts: Facts, tmp_path: Path) -> None:
    document = written(facts, tmp_path / "a")
    written(facts, tmp_path / "b")
    first, second = ((tmp_path / folder / "analysis.json").read_bytes() for folder in "ab")
    assert first == second
    lines = [line for line in first.decode().splitlines() if '"mode": ' in line]
    assert [json.loads(line.rstrip(","))["index"] for line in lines] == [op["index"] for op in document["ops"]]
