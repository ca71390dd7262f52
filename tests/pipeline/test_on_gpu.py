"""Every stage with ``runtime.device: cuda``; the integers are made and scored there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qatlib.emulator import Emulator
from qatlib.program import Program
from tests.pipeline import tiny
from tests.pipeline.conftest import lay_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_all_stages(tmp_path: Path) -> None:
    repository = lay_out(tmp_path)
    repository.set(runtime={"device": "cuda"})
    for stage in ("float_check", "calibrate", "qat", "convert", "compile_sim", "analyze"):
        repository.stage(stage)
    found, before = (
        json.loads((tmp_path / f"reports/{n}/metrics.json").read_text()) for n in ("convert", "float_check")
    )
    assert found["integer"]["accuracy"] > 0.9 * before["float"]["accuracy"]
    program = Program.load(tmp_path / "artifacts/program")
    x = torch.stack([tiny.build_data("test")[i][0] for i in range(16)])
    (here,), (there,) = Emulator(program)(x), Emulator(program, "cuda")(x)
    assert torch.equal(here, there.cpu())
