"""Which ops leave the integers, by which setting, and what a target refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from torch.nn import functional as F

import qatlib.profiler
from qatlib import calibrate, check_deploy_device, convert_fx, prepare_qat_fx, set_preserve_qat_mode
from qatlib.errors import StateError
from tests.analysis.analysis_nets import Trio
from tests.models import calibrated, images, model

X = images(2, 3, 8)


def net() -> nn.Module:
    return model(
        lambda s, x: s.last(F.relu(s.keep(s.c(s.c(x))))),
        c=nn.Conv2d(3, 3, 1), keep=nn.Conv2d(3, 3, 1), last=nn.Conv2d(3, 3, 1),
    )  # fmt: skip


def test_all_of_a_sound_model_is_integer(trio: Trio, tmp_path: Path) -> None:
    for one in (trio.fake, trio.integer, trio.integer.program):
        table = check_deploy_device(one, path=tmp_path / "deploy.csv")
        assert set(table["device"]) == {"integer"}
        assert {"stem", "block", "cat", "fc"} <= set(table["op"])
    assert (tmp_path / "deploy.csv").read_text().startswith("op,module,type,device,why")


def test_float_islands_by_the_setting_that_makes_them() -> None:
    fake = prepare_qat_fx(net(), hybrid=True, hybrid_dict={"module_name": ["keep"]}, example_inputs=[X])
    calibrate(fake, [X])
    set_preserve_qat_mode(fake, ("last",))
    table = check_deploy_device(fake).set_index("op")
    assert table.loc[["keep", "last"], "device"].tolist() == ["float", "float"]
    assert "hybrid_dict" in table.loc["keep", "why"]
    assert "preserve" in table.loc["last", "why"]
    assert table.loc[["c", "c#1"], "module"].tolist() == ["c (call 1)", "c (call 2)"]
    integer = check_deploy_device(convert_fx(fake)).set_index("op")
    floats = set(integer.index[integer["device"] == "float"])
    assert {"keep", "last"} <= floats
    assert not {"c", "c#1"} & floats


def test_modules_kept_whole_are_float() -> None:
    fake = calibrated(net(), X, leaf=["keep"], hybrid=True)
    table = check_deploy_device(fake).set_index("op")
    assert table.loc["keep", ["device", "why"]].tolist() == ["float", "kept whole (model.leaf or model.wrap)"]


def test_a_target_refuses_what_it_does_not_have() -> None:
    wide = model(lambda s, x: F.relu(s.a(x)), a=nn.Conv2d(3, 3, 1))
    fake = prepare_qat_fx(wide, qatlib.default_calib_8bit_weight_16bit_act_fake_quant_qconfig, example_inputs=[X])
    calibrate(fake, [X])
    integer = convert_fx(fake)
    table = check_deploy_device(integer, "bernoulli-like").set_index("op")
    assert table.loc["a", "device"] == "refused"
    assert "int16" in table.loc["a", "why"]
    assert set(check_deploy_device(integer)["device"]) == {"integer"}


def test_a_float_model_is_refused(trio: Trio) -> None:
    with pytest.raises(StateError, match="QAT155"):
        check_deploy_device(trio.float_model)


def test_the_names_that_scripts_know_are_public() -> None:
    names = (
        "check_deploy_device check_qconfig check_unfused_operations compare_weights featuremap_similarity"
        " get_module_called_count get_raw_features model_profiler profile_featuremap"
    )
    for name in names.split():
        assert getattr(qatlib, name) is getattr(qatlib.profiler, name)
        assert name in qatlib.profiler.__all__
