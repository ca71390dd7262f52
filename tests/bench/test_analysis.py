"""The bench of the analysis: other tools answer the same question, and one that is missing is named."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import torch
from torch import Tensor, nn

from bench.analysis import rivals
from bench.analysis.__main__ import measure, same_order
from bench.analysis.ours import Made, make
from bench.analysis.rivals import ALONE, EACH, Side, available, placeholder

TOOLS = {"esp-ppq": "esp_ppq", "AIMET": "aimet_torch", "torch.ao": "torch", "ONNX Runtime": "onnxruntime"}


class Net(nn.Module):
    """Three convolutions of which the second has weights that int8 resolves badly, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.second[0].weight[:, 0, 0, 0] *= 60.0  # type: ignore[index, operator, union-attr]
    return net


@pytest.fixture
def made(net: nn.Module, x: Tensor) -> Made:
    return make(net, x)


def test_ours_is_float_with_one_layer_rounded(made: Made) -> None:
    alone = made.sides()[ALONE].run()
    assert made.layers() == ("first.0", "second.0", "third.0", "head")
    assert max(made.layers(), key=lambda name: alone[name]) == "second.0"
    with torch.no_grad():
        exact = made.net(made.x)
        weight = made.net.head.weight
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        made.net.head.weight.copy_((weight / scale).round().clamp(-128, 127) * scale)  # type: ignore[union-attr, operator]
        noise = (made.net(made.x) - exact).square().sum() / exact.square().sum()
    assert alone["head"] == pytest.approx(float(noise), rel=0.02)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_measures_every_layer_and_finds_the_worst(
    tool: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(TOOLS[tool]) is None:
        pytest.skip(f"{tool} is not installed: bench/rivals-requirements.txt")
    monkeypatch.setattr(rivals, "MAKERS", {tool: rivals.MAKERS[tool]})
    weights = made.net.state_dict(keep_vars=False)
    before = {name: value.clone() for name, value in weights.items()}
    sides, missing = available(made.net, made.x)
    assert missing == {}
    for side in sides:
        said = side.run()
        assert len(said) >= len(made.layers())
        assert said == pytest.approx(dict(side.run())), "a second run says the same"
        if side.question == ALONE:
            worst = max(said, key=lambda name: said[name])
            assert "second" in worst
            ours = {name: made.sides()[ALONE].run()[name] for name in made.layers()}
            order = same_order(ours, said)
            assert order is not None
            assert order > 0.7
    assert all(torch.equal(value, before[name]) for name, value in made.net.state_dict().items())


def test_missing_and_broken_tools_are_named_in_the_table(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> list[Side]:
        raise ImportError("No module named 'esp_ppq'")

    def broken(*_: object) -> list[Side]:
        raise ValueError("another torch\nand more")

    def there(*_: object) -> list[Side]:
        return [Side("a tool", EACH, lambda: {"conv": 1.0})]

    monkeypatch.setattr(rivals, "MAKERS", {"esp-ppq": missing, "AIMET": broken, "tool": there})
    ratios, text = measure(net, x, rounds=1)
    assert "| | esp-ppq: not installed: No module named 'esp_ppq' |" in text
    assert "| | AIMET: does not run: ValueError: another torch |" in text
    (row,) = [line for line in text.splitlines() if "a tool" in line]
    assert re.fullmatch(r"\| every layer against float \| a tool \| 1 \| \S+ \| \S+ \|  \|  \|  \|", row)
    assert all(value > 0 for value in ratios.values())
    (all_ops,) = [line.split("|") for line in text.splitlines() if "sensitivity of every op" in line]
    assert [cell.strip() for cell in all_ops[3:6:2]] == [str(int(ratios["ops"])), "1"]
    assert all_ops[8].strip() == "1"


def test_order_is_by_name_else_one_by_one() -> None:
    ours = {"a": 1.0, "b": 2.0, "c": 4.0}
    assert same_order(ours, {"c": 9.0, "x": 0.0, "b": 8.0, "a": 7.0}) == pytest.approx(1.0)
    assert same_order(ours, {"/a/Conv": 3.0, "/b/Conv": 2.0, "/c/Conv": 1.0}) == pytest.approx(-1.0)
    assert same_order(ours, {"/a/Conv": 3.0}) is None


def test_a_placeholder_stands_for_what_is_not_there_and_goes() -> None:
    with placeholder("not_installed", "ops"):
        import not_installed.ops  # type: ignore[import-not-found]

        assert isinstance(not_installed.ops.Anything, type)
        assert not_installed.ops.Anything is not not_installed.ops.Other
    assert not {"not_installed", "not_installed.ops"} & set(sys.modules)
    with placeholder("json"):
        import json

        assert json.loads("1") == 1
