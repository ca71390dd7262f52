"""int16 weights: codes, exactness, agreement with fake-quant, and targets that have none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from qatlib.compiler import check_model, load_target
from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.export import check_onnx, export_onnx
from qatlib.fake.qconfig import QConfig
from qatlib.program import Program
from tests.models import calibrated, images, model
from tests.oracle import run

WIDE = QConfig(weight=replace(QConfig().weight, dtype="int16"))


def net() -> nn.Module:
    torch.manual_seed(0)
    return model(
        lambda s, x: s.head(F.relu(s.conv(x)).flatten(1)), conv=nn.Conv2d(3, 8, 3), head=nn.Linear(8 * 14 * 14, 5)
    )


def converted(qconfig: QConfig) -> Program:
    return to_program(calibrated(net(), images(8), qconfig_dict={"": qconfig}))


def test_int16_weights_have_int16_codes_and_are_exact() -> None:
    program = converted(WIDE)
    weight = program.constant(program.ops[1], "weight")
    assert weight.dtype == torch.int16
    assert int(weight.int().abs().flatten(1).amax(1).min()) >= 32767, "every channel uses its whole range"
    x = images(4, seed=5)
    _, traced = emulate(program, x, trace=True)
    for name, expected in run(program, x.numpy()).items():
        np.testing.assert_array_equal(traced[name].numpy(), expected, err_msg=name)


def test_onnx_runtime_multiplies_by_int16_weights(tmp_path: Path) -> None:
    program, x = converted(WIDE), images(4, seed=5)
    export_onnx(program, tmp_path / "net.onnx")
    assert not any(check_onnx(program, tmp_path / "net.onnx", (x,)).values())


def test_int16_weights_are_closer_to_float() -> None:
    x = images(4, seed=5)
    with torch.no_grad():
        wanted = net()(x)
    wide, narrow = (float((emulate(converted(q), x)[0] - wanted).norm()) for q in (WIDE, QConfig()))
    assert wide < narrow


def test_a_target_without_int16_weights_refuses_them() -> None:
    target = load_target("bayes-like")
    assert check_model(converted(QConfig()), target) == ()
    assert [v.code for v in check_model(converted(WIDE), target)] == ["QAT185", "QAT185"]
    rules = {kind: rule.model_copy(update={"weights": ("int8", "int16")}) for kind, rule in target.ops.items()}
    assert check_model(converted(WIDE), target.model_copy(update={"ops": rules})) == ()
