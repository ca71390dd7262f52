"""Which QConfig holds where: subclasses that call functions, containers, parts of fused operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.errors import QConfigError
from qatlib.fake.eager import prepare_qat
from qatlib.fake.model import FakeQuantModel, set_preserve_qat_mode
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import FakeQuantSpec, QConfig, get_default_qconfig
from tests.models import images, lively, model

INT16 = get_default_qconfig("int16")
WIDE_WEIGHTS = QConfig(weight=FakeQuantSpec(dtype="int16", method="min_max"))


class Standardized(nn.Conv2d):
    """Its forward is made of functions, as that of timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardized(3, 4, 1)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        for layer in self.layers:
            y = layer(y)
        return y + 0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.fc = Scaled(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.block(x).mean((2, 3))))


PARTS = {"conv": "block.conv.conv2d", "layer": "block.layers.0", "add": "block.add", "fc": "fc.linear"}


def net(**qconfigs: Any) -> Net:
    """``qconfigs`` by module name, ``_`` for a dot; "whole" is the model."""
    torch.manual_seed(0)
    made = lively(Net()).eval()
    for name, qconfig in qconfigs.items():
        made.get_submodule("" if name == "whole" else name.replace("_", ".")).qconfig = qconfig
    return made  # type: ignore[return-value]


def prepared(source: nn.Module, rules: Any = None, names: Any = None, hybrid: bool = True) -> FakeQuantModel:
    return prepare_qat_fx(source, rules, hybrid, names, example_inputs=[images(1)])


def formats(quantized: FakeQuantModel) -> dict[str, str]:
    found = dict(quantized.ops())
    return {
        part: "float" if found[name].hybrid else quantized.dtype(name) for part, name in PARTS.items() if name in found
    }


def wide(*parts: str) -> dict[str, str]:
    return dict.fromkeys(PARTS, "int8") | dict.fromkeys(parts, "int16")


def test_without_rules_all_is_the_default() -> None:
    assert formats(prepared(net())) == wide()


@pytest.mark.parametrize(
    ("qconfigs", "hit"),
    [
        ({"block_conv": INT16}, ("conv",)),
        ({"fc": INT16}, ("fc",)),
        ({"block": INT16}, ("conv", "layer", "add")),
        ({"block_layers": INT16}, ("layer",)),
        ({"block": INT16, "block_layers": QConfig()}, ("conv", "add")),
        ({"block": INT16, "block_conv": QConfig(), "block_layers_0": QConfig()}, ("add",)),
        ({"whole": INT16, "block": QConfig()}, ("fc",)),
        ({"block_layers_1": INT16}, ("layer",)),
        ({"block_layers_2": INT16}, ("layer",)),
        ({"block_layers_0": INT16, "block_layers_2": QConfig()}, ()),
        ({"block_layers_0": QConfig(), "block_layers_1": INT16, "block_layers_2": QConfig()}, ()),
        ({"block_layers_0": INT16, "block": QConfig()}, ("layer",)),
    ],
)
def test_attributes(qconfigs: dict[str, Any], hit: tuple[str, ...]) -> None:
    assert formats(prepared(net(**qconfigs))) == wide(*hit)
    whole = {} if "whole" in qconfigs else {"whole": QConfig()}
    assert formats(prepare_qat(net(**qconfigs, **whole), example_inputs=[images(1)])) == wide(*hit)


@pytest.mark.parametrize(
    ("kind", "name", "hit"),
    [
        (Standardized, "block.conv", ("conv",)),
        (Scaled, "fc", ("fc",)),
        (Block, "block", ("conv", "layer", "add")),
        (nn.Conv2d, "block.layers.0", ("layer",)),
        (nn.ReLU, "block.layers.2", ("layer",)),
        (nn.BatchNorm2d, "block.layers.1", ("layer",)),
        (F.conv2d, "block.conv.conv2d", ("conv",)),
    ],
)
def test_types_and_names(kind: Any, name: str, hit: tuple[str, ...]) -> None:
    assert formats(prepared(net(), {"module_type": {kind: INT16}})) == wide(*hit)
    assert formats(prepared(net(), {"module_name": {name: INT16}})) == wide(*hit)
    floats = formats(prepared(net(), names={"module_name": [name]}))
    assert floats == formats(prepared(net(), names={"module_type": [kind]}))
    assert floats == formats(prepared(net(), {"module_name": {name: None}}))
    assert floats == formats(prepared(net(), {"module_type": {kind: None}}))
    quantized = prepared(net())
    by_type = set_preserve_qat_mode(quantized, types=(kind,)) if isinstance(kind, type) else [PARTS[hit[0]]]
    assert set(by_type) >= {PARTS[part] for part in hit}
    assert set_preserve_qat_mode(quantized, (name,), value=False) == by_type


def test_the_more_exact_rule_wins() -> None:
    rules = {"": INT16, "module_type": {Block: QConfig()}}
    assert formats(prepared(net(), rules)) == wide("fc")
    rules["module_type"][Standardized] = INT16
    assert formats(prepared(net(), rules)) == wide("conv", "fc")
    rules["module_name"] = {"block": QConfig()}
    assert formats(prepared(net(), rules)) == wide("fc"), "a name before a type"
    assert formats(prepared(net(block=INT16), rules)) == wide("conv", "layer", "add", "fc"), (
        "an attribute before a name"
    )
    rules["module_name"]["block.conv"] = QConfig()
    assert formats(prepared(net(block=INT16), rules)) == wide("layer", "add", "fc"), "the name of an inner module"


def test_weights_go_by_the_convolution_and_the_output_by_the_last_named_part() -> None:
    op = prepared(net(block_layers_0=WIDE_WEIGHTS, block_layers_2=INT16)).op("block.layers.0")
    assert op.weight_fake_quant.spec.dtype == "int16"
    assert op.activation_post_process.spec.dtype == "int16"
    op = prepared(net(block_layers_2=WIDE_WEIGHTS.with_activation(scale=0.5))).op("block.layers.0")
    assert op.weight_fake_quant.spec.dtype == "int8"
    assert op.activation_post_process.spec.scale == 0.5


SPLIT = {
    "relu": ({"block_layers_2": None}, {"block.layers.0": False, "block.layers.2": True}),
    "batch norm": ({"block_layers_1": None}, {"block.layers.0": False, "block.layers.1": True}),
    "all but the relu": (
        {"block_layers": None, "block_layers_2": QConfig()},
        {"block.layers.0": True, "block.layers.2": False},
    ),
    "convolution": ({"block_layers_0": None}, {"block.layers.0": True}),
    "convolution, but not its batch norm": (
        {"block_layers_0": None, "block_layers_1": INT16},
        {"block.layers.0": True, "block.layers.1": False},
    ),
    "all": ({"block_layers": None}, {"block.layers.0": True}),
}


@pytest.mark.parametrize(("qconfigs", "is_float"), SPLIT.values(), ids=SPLIT.keys())
def test_what_is_to_be_float_is_not_fused_to_what_is_not(qconfigs: dict[str, Any], is_float: dict[str, bool]) -> None:
    x, source = images(4), net(**qconfigs)
    quantized = prepared(source)
    layers = {
        name: op.hybrid for name, op in quantized.ops() if name.startswith("block.layers") and "quant" not in name
    }
    assert layers == is_float
    torch.testing.assert_close(quantized(x), source(x), rtol=1e-4, atol=1e-5)


def test_float_by_attribute_needs_hybrid_as_other_rules_do() -> None:
    with pytest.raises(QConfigError, match=r"QAT146 fc.linear: 1 operators"):
        prepared(net(fc=None), hybrid=False)


def test_parametrized_layers_have_the_type_that_the_user_wrote() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    quantized = prepared(model(lambda s, x: F.relu(s.c(x)), c=layer), {"module_type": {nn.Conv2d: INT16}})
    assert quantized.dtype("c") == "int16"


def test_a_module_known_by_two_names_goes_by_its_own_and_by_its_callers() -> None:
    class Caller(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x))

    conv = Standardized(3, 3, 1)
    source = model(lambda s, x: s.caller(x) * s.a(x), a=conv, caller=Caller(conv))
    source.caller.qconfig = INT16
    quantized = prepared(source)
    assert [quantized.dtype(name) for name in ("a.conv2d", "a.conv2d#1")] == ["int16", "int8"]


@pytest.mark.parametrize("where", ["attribute", "rule"])
def test_what_is_no_qconfig_is_named(where: str) -> None:
    foreign: Any = torch.ao.quantization.default_qconfig
    source, rules = (net(fc=foreign), None) if where == "attribute" else (net(), {"module_name": {"fc": foreign}})
    with pytest.raises(QConfigError, match=r"QAT142 .*fc.*is a torch.ao.quantization.qconfig.QConfig"):
        prepared(source, rules)


def test_a_prefix_or_type_that_preserves_nothing() -> None:
    for arguments in ({"prefixes": ("blok",)}, {"types": (nn.GRU,)}):
        with pytest.raises(QConfigError, match="QAT144"):
            set_preserve_qat_mode(prepared(net()), **arguments)
