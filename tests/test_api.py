"""The public names, used as a script would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qatlib


@pytest.mark.parametrize("name", qatlib.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(qatlib, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = qatlib.nothing_like_this


def test_importing_the_package_or_its_command_leaves_torch_out() -> None:
    script = "import sys, qatlib, qatlib.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_float_to_integers_in_a_script(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    images = torch.rand(16, 3, 6, 6) * 2 - 1
    model = qatlib.prepare_qat_fx(net.eval(), example_inputs=[images[:1]])
    assert qatlib.calibrate(model, [images[:8], images[8:]]) == 16
    integer = qatlib.convert_fx(model)
    apart = (integer(images) - net(images)).abs().max()
    assert apart < 0.05 * net(images).abs().max()
    integer.program.save(tmp_path / "program")
    again = qatlib.Program.load(tmp_path / "program")
    assert torch.equal(qatlib.emulate(again, images)[0], integer(images))
