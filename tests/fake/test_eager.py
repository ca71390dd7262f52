"""QConfigs as attributes, and modules that the user fused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlib.conversion import convert_fx
from qatlib.errors import QConfigError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.eager import prepare_qat
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import QConfig, get_default_qconfig
from qatlib.fake.stubs import DeQuantStub, QuantStub
from tests.models import images, lively

INT16 = get_default_qconfig("int16")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(scale=1 / 32), DeQuantStub()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.head(self.body(self.quant(x)) * 2 + 1))


def net(**qconfigs: Any) -> Net:
    """``qconfigs`` by module name, ``_`` for a dot; "model" is the whole."""
    torch.manual_seed(0)
    made = lively(Net()).eval()
    for name, qconfig in qconfigs.items():
        made.get_submodule("" if name == "model" else name.replace("_", ".")).qconfig = qconfig
    return made  # type: ignore[return-value]


def dtypes(quantized: FakeQuantModel) -> dict[str, str]:
    return {name: "hybrid" if op.hybrid else quantized.dtype(name) for name, op in quantized.ops()}


def prepared(model: nn.Module, **options: Any) -> FakeQuantModel:
    return prepare_qat(model, example_inputs=[images(1)], **options)


def test_a_module_has_the_qconfig_of_the_nearest_module_around_it() -> None:
    found = dtypes(prepared(net(model=QConfig(), body=INT16, body_3=QConfig())))
    assert found["body.0"] == "int16"
    assert found["body.3"] == found["mul"] == "int8"
    assert found["head"] == "float32", "the output keeps its accumulator under the global qconfig"


def test_none_keeps_what_is_inside_in_float() -> None:
    found = dtypes(prepared(net(model=QConfig(), body=None)))
    assert found["body.0"] == found["body.3"] == "hybrid"
    assert found["head"] == "float32"
    assert found["mul"] == "int8"


def test_it_is_the_model_of_prepare_qat_fx() -> None:
    x = images(8)
    eager, traced = prepared(net(model=QConfig())), prepare_qat_fx(net(), example_inputs=[images(1)])
    for one in (eager, traced):
        calibrate(one, [x])
    assert eager(x).equal(traced(x))
    assert convert_fx(eager)(x).equal(convert_fx(traced)(x))


@pytest.mark.parametrize("training", [False, True])
def test_modules_that_the_user_fused(training: bool) -> None:
    x, source = images(8), net(model=QConfig())
    expected = source(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import fuse_modules, fuse_modules_qat

        source.train(training)
        fuse = fuse_modules_qat if training else fuse_modules
        source.body = fuse(source.body, [["0", "1", "2"]])
    quantized = prepared(source.eval())
    assert [op.node.op for name, op in quantized.ops() if name.startswith("body")] == ["conv", "conv"]
    torch.testing.assert_close(quantized(x), expected, rtol=1e-4, atol=1e-4)
    calibrate(quantized, [x])
    assert float((convert_fx(quantized)(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_hybrid_names_work_here_too() -> None:
    found = dtypes(prepared(net(model=QConfig()), hybrid=True, hybrid_dict={"module_name": ["body.0"]}))
    assert found["body.0"] == "hybrid"
    with pytest.raises(QConfigError, match=r"QAT146 .*1 operators are to stay float"):
        prepared(net(model=QConfig()), hybrid_dict={"module_name": ["body.0"]})


def test_what_quantizes_nothing_is_refused() -> None:
    with pytest.raises(QConfigError, match="QAT146 Net: no module has a qconfig"):
        prepared(net())
    with pytest.raises(QConfigError, match="QAT146"):
        prepared(net(model=None))


def test_a_foreign_qconfig_is_named() -> None:
    from torch.ao.quantization import default_qconfig

    with pytest.raises(QConfigError, match=r"QAT142 body.qconfig: is a torch.ao.quantization.qconfig.QConfig"):
        prepared(net(model=QConfig(), body=default_qconfig))
