"""The same integers on CUDA."""

from __future__ import annotations

import pytest
import torch

from qatlib import calibrate, convert_fx, prepare_qat_fx
from qatlib.emulator import Emulator
from tests.models import everything, images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_every_value_equals_the_cpu() -> None:
    net, batch = everything(), images(8)
    model = prepare_qat_fx(net, example_inputs=[batch])
    calibrate(model, [batch])
    program = convert_fx(model).program
    there = Emulator(program, "cuda").trace(batch)
    for name, here in Emulator(program).trace(batch).items():
        assert torch.equal(here, there[name].cpu()), name


def test_calibration_runs_on_the_device() -> None:
    net, batch = everything().cuda(), images(8).cuda()
    model = prepare_qat_fx(net, example_inputs=[batch])
    calibrate(model, [batch], "cuda")
    assert all(q.scale.is_cuda for _, op in model.ops() if (q := op.activation_post_process))
