"""What the integer form of an example is held to, given the artifacts of its pipeline."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import lsb_table
from qatlib.conversion import IntegerModel
from qatlib.export import check_onnx, export_onnx
from qatlib.fake.model import FakeQuantModel
from qatlib.pipeline.config import load_config
from qatlib.pipeline.project import Project
from qatlib.program import Program

ROOT = Path(__file__).parents[2]
ITEMS = 64
MOST_SHARE = {"int8": 1e-3, "int16": 2.0**-5, "int32": 1e-3}
"""Share of elements off by one code: section 5 of docs/numerics.md, with multipliers of 20 bits."""
MOST_SHARE_OF_SAMPLERS = 2e-2
"""Of interpolation. Halving weights make one result in 16 a tie, which float32 rounds either way; positions of a grid
are rounded to 2^-10 pixels in integers only."""
SAMPLERS = ("grid_sample", "resize_linear")

Decide = Callable[[Any], Tensor]
"""Outputs of a batch as decisions ``[N, ...]``; -1 is none."""


@dataclass(frozen=True)
class Made:
    """What the pipeline left in the folder of an example."""

    folder: Path
    project: Project
    model: FakeQuantModel
    program: Program


@contextlib.contextmanager
def made(name: str) -> Iterator[Made]:
    """The pipeline's results, loaded; skips the test without them. Torch is as before afterwards."""
    folder = ROOT / "examples" / name
    needed = ("float.safetensors", "artifacts/qat.safetensors", "artifacts/program")
    missing = [path for path in needed if not (folder / path).exists()]
    if missing:
        pytest.skip(f"{missing[0]} of examples/{name} is not there: dvc repro examples/{name}/dvc.yaml")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        with contextlib.chdir(folder):
            project = Project(load_config("params.yaml"))
            model, program = project.load_fake_quant("artifacts/qat.safetensors"), Program.load("artifacts/program")
            yield Made(folder, project, model, program)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def inputs_of(it: Made) -> tuple[Tensor, ...]:
    inputs, _ = next(iter(it.project.batches("test", ITEMS, ITEMS)))
    assert len(inputs[0]) == ITEMS
    return tuple(inputs)


def assert_ops_agree(it: Made) -> None:
    """Every op within its bounds of the fake-quant model's on the same inputs; the committed table has these ops."""
    found = lsb_table.rows(it.model, it.program, *inputs_of(it))
    committed = (it.folder / "reports" / "lsb.csv").read_text().splitlines()
    assert [line.split(",")[:5] for line in committed[1:]] == [
        line.split(",")[:5] for line in lsb_table.as_csv(found).splitlines()[1:]
    ]
    for row in found:
        if row.kind == "table" and row.dtype == "int16":
            assert row.stored_lsb is not None
            assert row.largest_lsb <= row.stored_lsb + 0.5 + 2.0**-8, row
            continue
        assert row.largest_lsb <= 1, row
        allowed = (MOST_SHARE_OF_SAMPLERS if row.kind in SAMPLERS else MOST_SHARE[row.dtype]) * row.elements
        assert row.differing <= allowed + 3 * math.sqrt(allowed), row


def assert_onnx_runtime_gives_the_integers(it: Made, folder: Path) -> None:
    """0 differing elements in every value of the Program, optimizations on and off."""
    path = folder / "net.onnx"
    export_onnx(it.program, path)
    counts = check_onnx(it.program, path, inputs_of(it))
    assert set(it.program.values) - set(it.program.inputs) <= set(counts)
    assert {name: count for name, count in counts.items() if count} == {}


def agreement(it: Made, decide: Decide) -> float:
    """Share of equal decisions of fake-quant and integer on the test split, of those that either takes."""
    integer_model, equal, taken = IntegerModel(it.program, it.project.device), 0, 0
    with torch.no_grad():
        for inputs, _ in it.project.batches("test"):
            fake, integer = decide(it.model(*inputs)), decide(integer_model(*inputs))
            either = (fake >= 0) | (integer >= 0)
            equal, taken = equal + int((fake == integer)[either].sum()), taken + int(either.sum())
    return equal / taken


def assert_metrics_are_the_committed(it: Made) -> None:
    """Fake-quant and integer score what the reports in git say, and keep the goal on the float metric."""
    name = it.project.metric().name
    reports = {stage: _section(it.folder, stage)[name] for stage in ("float_check", "qat", "convert", "compile_sim")}
    integer = it.project.evaluate(IntegerModel(it.program, it.project.device), "test").value
    assert it.project.evaluate(it.model, "test").value == pytest.approx(reports["qat"], abs=0.01)
    assert integer == pytest.approx(reports["convert"], abs=0.01)
    assert reports["compile_sim"] == reports["convert"]
    assert integer >= 0.98 * reports["float_check"]


def assert_the_docs_show_the_reports(name: str) -> None:
    """The row of docs/examples.md has the figures of the reports, rounded."""
    float_check, qat, convert = (
        _section(ROOT / "examples" / name, stage) for stage in ("float_check", "qat", "convert")
    )
    (metric,) = {"map50", "accuracy"} & set(convert)
    assert shown(name)[4:7] == [f"{section[metric]:.4f}" for section in (float_check, qat, convert)]


def agreement_shown(name: str) -> float:
    """The agreement in the row of docs/examples.md, as a share."""
    return float(shown(name)[7].rstrip(" %")) / 100


def shown(name: str) -> list[str]:
    """The cells of an example's row in docs/examples.md."""
    lines = (ROOT / "docs" / "examples.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| [{name}]")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def _section(folder: Path, stage: str) -> dict[str, float]:
    """The one section of a metrics file."""
    (section,) = json.loads((folder / "reports" / stage / "metrics.json").read_text()).values()
    return dict(section)
