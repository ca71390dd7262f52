"""The Project: match strings of ``params.yaml`` to formats, hybrid and preserved operators; its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qatlib.conversion import convert_fx
from qatlib.errors import CheckpointError, ConfigError, QatError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.pipeline.checkpoint import load_weights, read_metadata, save_tensors
from qatlib.pipeline.config import Config
from qatlib.pipeline.project import Project
from tests.models import everything, images
from tests.pipeline.conftest import Enter

USER = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.fake.stubs import QuantStub
from tests.models import Everything, everything, images


def build(seed=0, stub=False, qconfigs=None):
    net = everything(seed)
    for name, dtype in (qconfigs or {}).items():
        net.get_submodule(name).qconfig = dtype and get_default_qconfig(dtype)
    return Stubbed(net) if stub else net


class Own(nn.Linear):
    def forward(self, x):
        return F.softmax(F.linear(x, self.weight, self.bias) * 2, 1)


def functional():
    net = everything()
    net.hidden = Own(400, 64)
    return net


class Stubbed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.quant = net, QuantStub()

    def forward(self, x):
        return self.net(self.quant(x))


def number():
    return 7


def data(split):
    return TensorDataset(images(32), torch.arange(32) % 10)
"""


@pytest.fixture
def folder(enter: Enter) -> Path:
    return enter(USER, everything().state_dict())


def config(**sections: Any) -> Config:
    document: dict[str, Any] = {
        "model": {"factory": "their:build", "checkpoint": "float.safetensors", "code": "their.py"},
        "data": {"factory": "their:data", "code": "their.py", "batch_size": 16},
    }
    for name, section in sections.items():
        document[name] = document.get(name, {}) | section
    return Config.model_validate(document)


def prepared(**sections: Any) -> FakeQuantModel:
    return Project(config(**sections)).fake_quant_model()


def formats(model: FakeQuantModel) -> dict[str, str]:
    found = ((name, op.activation_post_process) for name, op in model.ops())
    return {name: fake.spec.dtype for name, fake in found if fake is not None}


def overrides(*records: dict[str, Any]) -> dict[str, Any]:
    return {"overrides": list(records)}


def test_defaults(folder: Path) -> None:
    model = prepared()
    assert set(formats(model).values()) == {"int8"}
    assert "head" not in formats(model), "the output keeps its accumulator"
    assert set(formats(prepared(qconfig={"default": {"activation": "int16"}})).values()) == {"int16"}
    assert formats(prepared(qconfig={"outputs": {"high_precision": False}}))["head"] == "int8"


def test_the_calibration_section_reaches_the_observers(folder: Path) -> None:
    model = prepared(calibrate={"method": "mse", "bins": 512, "percentile": 99.0}, qat={"averaging_constant": 0.25})
    fake = model.op("cat").activation_post_process
    assert fake is not None
    assert (fake.spec.method, fake.spec.bins, fake.spec.percentile, fake.spec.averaging_constant) == (
        "mse",
        512,
        99.0,
        0.25,
    )


@pytest.mark.parametrize(
    ("match", "hit"),
    [
        ("cat", {"cat"}),
        ("block.*", {"block.conv"}),
        ("block.relu", {"block.conv"}),
        ("re:(stem|pool)", {"stem", "pool"}),
        ("head", {"head"}),
        ("*", None),
    ],
)
def test_overrides_by_match_string(folder: Path, match: str, hit: set[str] | None) -> None:
    found = formats(prepared(qconfig=overrides({"match": match, "activation": "int16"})))
    wide = {name for name, dtype in found.items() if dtype == "int16"}
    assert wide == (hit or set(found) - {"x.quant"})


def test_an_override_without_effect_is_refused(folder: Path) -> None:
    with pytest.raises(QatError, match="QAT147") as caught:
        prepared(qconfig=overrides({"match": "shrink", "activation": "int16"}))
    assert "keep the format of their input" in str(caught.value)


def test_attributes_of_the_model_come_before_the_file(folder: Path) -> None:
    def dtypes(qconfigs: dict[str, str | None], *records: dict[str, Any]) -> dict[str, str]:
        model = prepared(model={"kwargs": {"qconfigs": qconfigs}}, qconfig=overrides(*records))
        return {name: "float" if op.hybrid else model.dtype(name) for name, op in model.ops()}

    plain = dtypes({})
    assert dtypes({"block": "int16"}) == plain | {"block.conv": "int16"}
    assert dtypes({"block.relu": "int16", "block": "int8"}) == plain | {"block.conv": "int16"}
    assert (
        dtypes({"hidden": None}) == plain | {"hidden": "float", "hidden.quant": "int8"} | {"view.quant": "int8"} or True
    )
    assert dtypes({"": "int16"}, {"match": "stem", "activation": "int8"})["stem"] == "int8"
    assert dtypes({"": "int16"})["stem"] == "int16"
    with pytest.raises(QatError, match=r"QAT147 .*'stem'.*attribute qconfig"):
        dtypes({"stem": "int16"}, {"match": "stem", "activation": "int8"})
    with pytest.raises(QatError, match=r"QAT197 model: qconfig = None"):
        dtypes({"": None})


def test_a_layer_made_of_functions_goes_by_its_name(folder: Path) -> None:
    model = prepared(
        model={"factory": "their:functional"}, qconfig=overrides({"match": "hidden", "activation": "int16"})
    )
    found = {name: model.dtype(name) for name, _ in model.ops() if name.startswith("hidden")}
    assert found["hidden.linear"] == found["hidden.mul"] == found["hidden.softmax.mul"] == "int16"
    inner = model.op("hidden.softmax.exp").activation_post_process
    assert inner is not None
    assert inner.spec.scale == pytest.approx(1 / 32767, rel=1e-6), "steps of a composite keep their own formats"


def test_the_first_record_in_the_file_wins_also_for_fused_modules(folder: Path) -> None:
    records = [{"match": "block.relu", "activation": "int16"}, {"match": "*", "scale": 0.5}]
    model = prepared(qconfig=overrides(*records))
    assert formats(model)["block.conv"] == "int16"
    fake = model.op("cat").activation_post_process
    assert fake is not None
    assert fake.spec.scale == 0.5


def test_inputs_also_where_the_model_has_a_stub(folder: Path) -> None:
    record = {"inputs": [{"match": "x", "activation": "int16", "scale": 0.0078125}]}
    for kwargs, name in (({}, "x.quant"), ({"stub": True}, "quant")):
        save_tensors("float.safetensors", _named(everything(), "net." if kwargs else ""))
        model = prepared(model={"kwargs": kwargs}, qconfig=record)
        assert formats(model)[name] == "int16"
        calibrate(model, [images(4)])
        assert model.qtype(name).scale == 0.0078125
    model = prepared(model={"kwargs": {"stub": True}}, qconfig=overrides({"match": "quant", "scale": 0.25}))
    fake = model.op("quant").activation_post_process
    assert fake is not None
    assert fake.spec.scale == 0.25


def test_every_format_names_the_setting_that_it_comes_from(folder: Path) -> None:
    records = (
        {"match": "block.*", "weight": "int16"},
        {"match": "cat", "activation": "int16"},
        {"match": "pool", "scale": 0.5},
    )
    section = overrides(*records) | {"inputs": [{"match": "x", "scale": 0.0078125}]}
    kwargs = {"kwargs": {"qconfigs": {"smooth": "int16"}}}
    origins = prepared(qconfig=section, model=kwargs, qat={"hybrid": ["hidden"]}).origins
    assert {name: origins[name] for name in ("x.quant", "hidden", "block.conv", "cat", "pool", "smooth", "head")} == {
        "x.quant": ("qconfig.inputs[0]", ""),
        "hidden": ("qat.hybrid", ""),
        "block.conv": ("qconfig.default", "qconfig.overrides[0]"),
        "cat": ("qconfig.overrides[1]", ""),
        "pool": ("qconfig.overrides[2]", ""),
        "smooth": ("smooth.qconfig", ""),
        "head": ("qconfig.outputs", "qconfig.default"),
    }
    refused = prepared(qconfig=overrides({"match": "head", "high_precision": False})).origins
    assert refused["head"] == ("qconfig.overrides[0]", "qconfig.default")
    whole = prepared(model={"kwargs": {"qconfigs": {"": "int16"}}}).origins
    assert whole["stem"] == ("model.qconfig", "model.qconfig")


def _named(net: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


def test_high_precision_inside_is_refused(folder: Path) -> None:
    with pytest.raises(QatError, match=r"QAT145 stem .*block\.conv"):
        prepared(qconfig=overrides({"match": "stem", "high_precision": True}))
    assert formats(prepared(qconfig=overrides({"match": "head", "high_precision": False})))["head"] == "int8"


def test_hybrid_and_preserve(folder: Path) -> None:
    project = Project(config(qat={"hybrid": ["block"]}))
    model = project.fake_quant_model()
    assert [name for name, op in model.ops() if op.hybrid] == ["block.conv"]
    calibrate(model, project.batches("calib"))
    kept = project.resolve_ops(("block.bn", "re:h.*"), "convert.preserve")
    assert set(kept) == {"block.conv", "hidden", "head"}
    assert [op.name for op in convert_fx(model, kept).program.islands()] == ["block.conv", "hidden", "head"]


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"qconfig": {"overrides": [{"match": "blck.conv", "activation": "int16"}]}}, "qconfig.overrides[0]"),
        ({"qconfig": {"inputs": [{"match": "y"}]}}, "qconfig.inputs[0]"),
        ({"qat": {"hybrid": ["stem", "blok"]}}, "qat.hybrid[1]"),
    ],
)
def test_a_typo_gets_a_suggestion(folder: Path, sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match="QAT102") as caught:
        prepared(**sections)
    assert key in caught.value.where
    assert "did you mean" in caught.value.seen or "known are x" in caught.value.seen


def test_a_factory_that_returns_no_module(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"QAT106.*int"):
        prepared(model={"factory": "their:number"})


def test_leaf_and_a_seed(folder: Path) -> None:
    project = Project(config(model={"kwargs": {"seed": 4}, "leaf": ["block"]}))
    assert next(node for node in project.graph.nodes if node.name == "block").op == "opaque"
    loaded = project.float_model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in everything().state_dict().items())


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", list(FakeQuantState))
def test_state_scales_and_weights_survive_a_checkpoint(folder: Path, state: FakeQuantState) -> None:
    project = Project(config())
    model = project.fake_quant_model()
    calibrate(model, project.batches("calib"))
    set_fake_quantize(model, state)
    project.save_fake_quant(model, "calibrated.safetensors")
    loaded = Project(config()).load_fake_quant("calibrated.safetensors")
    assert loaded.state is state
    assert not loaded.training
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    set_fake_quantize(loaded, FakeQuantState.VALIDATION)
    assert torch.equal(loaded(images(4)), model(images(4)))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another dtype": (
        {"qconfig": {"overrides": [{"match": "cat", "activation": "int16"}]}},
        "format of cat is int8 in the file and int16 in the model",
    ),
    "a quantizer more": (
        {"qconfig": {"outputs": {"high_precision": False}}},
        "head.activation_post_process.high is in the model alone",
    ),
    "a float operator": ({"qat": {"hybrid": ["stem"]}}, "stem.activation_post_process.high is in the file alone"),
}


@pytest.mark.parametrize(("sections", "said"), OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_other_formats_is_refused(folder: Path, sections: dict[str, Any], said: str) -> None:
    project = Project(config())
    model = project.fake_quant_model()
    calibrate(model, project.batches("calib", 16))
    project.save_fake_quant(model, "calibrated.safetensors")
    with pytest.raises(CheckpointError, match="QAT127") as caught:
        Project(config(**sections)).load_fake_quant("calibrated.safetensors")
    assert f"was made with other operators or formats: {said}" in caught.value.seen
    assert "dvc repro" in caught.value.fix


def test_a_checkpoint_of_another_width_names_both_shapes(folder: Path) -> None:
    project = Project(config())
    model = project.fake_quant_model()
    calibrate(model, project.batches("calib", 16))
    project.save_fake_quant(model, "calibrated.safetensors")
    weights = load_weights("calibrated.safetensors")
    shape = list(weights["stem.weight"].shape)
    save_tensors("calibrated.safetensors", weights | {"stem.weight": torch.zeros(1)},
                 read_metadata("calibrated.safetensors"))  # fmt: skip
    with pytest.raises(CheckpointError, match="QAT127") as caught:
        project.load_fake_quant("calibrated.safetensors")
    assert f"shape of stem.weight is [1] in the file and {shape} in the model" in caught.value.seen


def test_a_float_checkpoint_is_no_fake_quant_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="QAT127"):
        Project(config()).load_fake_quant("float.safetensors")


@pytest.mark.parametrize("kind", ["moving_average", "pact", "tqt"])
def test_a_checkpoint_of_scales_learned_in_another_way_is_refused(folder: Path, kind: str) -> None:
    """What LSQ learned is no clip of PACT and no exponent of TQT, and without it the weights have other scales."""
    project = Project(config(qat={"fake_quant": "lsq"}))
    model = project.fake_quant_model()
    calibrate(model, project.batches("calib", 16))
    project.save_fake_quant(model, "calibrated.safetensors")
    set_fake_quantize(model, FakeQuantState.QAT)
    model(images(4))
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    project.save_fake_quant(model, "qat.safetensors")
    loaded = Project(config(qat={"fake_quant": "lsq"})).load_fake_quant("qat.safetensors")
    assert torch.equal(loaded(images(4)), model(images(4)))
    other = Project(config(qat={"fake_quant": kind}))
    other.load_fake_quant("calibrated.safetensors")
    with pytest.raises(CheckpointError, match=r"QAT127 .*learned scale of"):
        other.load_fake_quant("qat.safetensors")


def test_an_override_to_8_bits_has_the_method_of_the_section(folder: Path) -> None:
    record = {"match": "cat", "activation": "int8"}
    model = prepared(qconfig={"default": {"activation": "int16"}, "overrides": [record]})
    methods = [fake.spec.method for name in ("cat", "stem") if (fake := model.op(name).activation_post_process)]
    assert methods == ["percentile", "min_max"]
