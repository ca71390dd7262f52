"""Float weights against quantized ones: against NumPy, per channel, tracing the float model as the other was."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qatlib import compare_weights
from qatlib.errors import StateError
from qatlib.fake.model import set_fake_quantize
from qatlib.fake.state import FakeQuantState
from tests.analysis.analysis_nets import Net, Trio, quantized
from tests.models import calibrated, images, model


def folded(net: Net) -> np.ndarray:
    """Weights of ``stem`` times what batch norm multiplies each channel by."""
    factor = net.bn.weight / torch.sqrt(net.bn.running_var + net.bn.eps)
    return (net.stem.weight * factor.view(-1, 1, 1, 1)).detach().double().numpy().reshape(8, -1)


def test_rows_equal_numpy_on_folded_and_rounded_weights(trio: Trio, tmp_path: Path) -> None:
    table = compare_weights(trio.float_model, trio.fake, tmp_path / "weights.csv").set_index("module")
    assert list(table.index) == ["stem", "block", "side", "fc"]
    exact = folded(trio.float_model)
    scale = np.abs(exact).max(1, keepdims=True) * 2 / 255
    rounded = np.clip(np.rint(exact / scale), -128, 127) * scale
    row, error = table.loc["stem"], rounded - exact
    assert (row["channels"], row["dtype"], row["type"]) == (8, "int8", "Conv2d")
    assert row["sqnr_db"] == pytest.approx(10 * np.log10((exact**2).sum() / (error**2).sum()), abs=0.05)
    assert row["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-3)
    assert row["max_error_lsb"] == pytest.approx(0.5, abs=0.02)
    assert row["cosine"] == pytest.approx((exact * rounded).sum() / np.linalg.norm(exact) / np.linalg.norm(rounded))
    largest = np.abs(exact).max(1)
    assert row["spread"] == pytest.approx(largest.max() / np.median(largest), rel=1e-5)
    worst = 10 * np.log10((exact**2).sum(1) / (error**2).sum(1))
    assert row["worst_channel"] == worst.argmin()
    assert row["worst_sqnr_db"] == pytest.approx(worst.min(), abs=0.05)
    assert (tmp_path / "weights.csv").read_text().startswith("module,type,channels,dtype,cosine,sqnr_db")


def test_of_an_integer_model_as_of_the_fake_quant_model(trio: Trio) -> None:
    first = compare_weights(trio.fake, trio.fake).set_index("module")
    for integer in (trio.integer, trio.integer.program):
        second = compare_weights(trio.fake, integer).set_index("module")
        assert list(second.index) == list(first.index)
        assert second["sqnr_db"].to_numpy() == pytest.approx(first["sqnr_db"].to_numpy(), abs=0.02)


def test_a_channel_that_is_far_wider_shows_in_the_spread() -> None:
    net = Net().eval()
    with torch.no_grad():
        net.side.weight[2] *= 50
    x = images(4, 3, 8)
    table = compare_weights(net, quantized(net, (x,))).set_index("module")
    assert table.loc["side", "spread"] > 20 > table.loc["block", "spread"]


def test_of_a_trained_model_the_difference_is_training_too(trio: Trio) -> None:
    trained = copy.deepcopy(trio.fake)
    with torch.no_grad():
        trained.op("side").get_parameter("weight").mul_(1.5)
    table = compare_weights(trio.float_model, trained).set_index("module")
    assert table.loc["side", "sqnr_db"] == pytest.approx(20 * np.log10(2), abs=0.3)
    assert table.loc["block", "sqnr_db"] > 35


def test_shared_and_functional_weights_and_layers_kept_whole() -> None:
    net = model(
        lambda s, x: nn.functional.conv2d(s.keep(s.c(s.c(x))), s.w),
        c=nn.Conv2d(3, 3, 1), keep=nn.Sequential(nn.PReLU()),
        w=nn.Parameter(torch.randn(2, 3, 1, 1)),
    )  # fmt: skip
    x = images(2, 3, 8)
    table = compare_weights(net, calibrated(net, x, leaf=["keep"], hybrid=True))
    assert list(table["module"])[:2] == ["c (call 1)", "c (call 2)"]
    assert "conv2d" in list(table["module"])[-1]


def test_another_model_and_another_state_are_refused(trio: Trio) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(14, 5)

    with pytest.raises(StateError, match=r"QAT158 side: .*\[6, 8, 1, 1\].*\[4, 8, 1, 1\]"):
        compare_weights(Wider().eval(), trio.fake)
    with pytest.raises(StateError, match="QAT155 float_model: is a Net"):
        compare_weights(trio.float_model, trio.integer)
    with pytest.raises(StateError, match="QAT155"):
        compare_weights(trio.float_model, trio.float_model)
    moving = copy.deepcopy(trio.fake)
    set_fake_quantize(moving, FakeQuantState.QAT)
    with pytest.raises(StateError, match="QAT156"):
        compare_weights(trio.float_model, moving)
