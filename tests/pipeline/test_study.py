"""The study of a project whose outputs have no row per sample: all but the worst samples, which get a note."""

from __future__ import annotations

import pytest

from qatlib.analysis.bad_case import find_bad_case
from qatlib.analysis.facts import Facts
from qatlib.analysis.outcome import publish
from qatlib.analysis.study import study_of, write_study
from qatlib.analysis.study_view import show
from qatlib.errors import DataError
from qatlib.fake.calibrate import calibrate
from qatlib.pipeline.checkpoint import save_tensors
from qatlib.pipeline.config import Config
from qatlib.pipeline.conversion import program_of
from qatlib.pipeline.project import Project
from tests.pipeline.conftest import Enter

USER = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Layered(nn.Module):
    '''Output ``[1, N, 4]``, as the state of a recurrent layer.'''

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).unsqueeze(0)


def build():
    torch.manual_seed(0)
    return Layered()


def data(split):
    return TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 4)
"""


def test_bad_cases_are_left_out_with_a_note(enter: Enter, capsys: pytest.CaptureFixture[str]) -> None:
    folder = enter(USER, {})
    import their  # type: ignore[import-not-found]

    save_tensors("float.safetensors", their.build().state_dict())
    config = Config.model_validate(
        {
            "model": {"factory": "their:build", "checkpoint": "float.safetensors", "code": "their.py"},
            "data": {"factory": "their:data", "code": "their.py", "batch_size": 16},
            "compile": {"target": "bayes-like"},
            "analyze": {"sensitivity": {"images": 16, "batch_size": 8}},
        }
    )
    project = Project(config)
    fake = project.fake_quant_model()
    calibrate(fake, project.calibration_batches())
    for name in ("calibrated", "qat"):
        project.save_fake_quant(fake, f"artifacts/{name}.safetensors")
    program_of(project, fake).save("artifacts/program")
    assert config.analyze.sensitivity is not None
    study = study_of(project, config.analyze.sensitivity)
    assert study.steps is not None
    assert study.conversion is not None
    assert study.bad_cases == ()
    assert study.notes == tuple(
        f"bad cases of {mode} are not measured: outputs has shape [1, 8, 4] for 8 samples" for mode in ("FvsQ", "QvsQ")
    )
    write_study(study, folder / "reports")
    assert (folder / "reports/bad_cases.csv").read_text().count("\n") == 1
    show(study)
    assert study.notes[0] in capsys.readouterr().out.replace("\n", " ")
    assert publish(Facts(study=study), folder / "reports").notes == study.notes
    with pytest.raises(DataError, match="QAT218"):
        find_bad_case(project.float_model, fake, project.batches("val", 16, 8))
