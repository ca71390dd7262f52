"""Outputs channel by channel, against NumPy."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib import channel_similarity, get_raw_features
from qatlib.analysis.channels import COLUMNS
from qatlib.errors import ConfigError, QConfigError
from qatlib.fake.model import FakeQuantModel
from tests.analysis.analysis_nets import Trio
from tests.models import calibrated, images, model


def outputs(of: Any, data: Any, name: str) -> np.ndarray[Any, Any]:
    found = [f.data for x in data for f in get_raw_features(of, x) if (f.name, f.role) == (name, "output")]
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize("mode", ["FvsQ", "QvsQ", "CvsQ"])
def test_every_channel_has_its_numbers(trio: Trio, mode: Any) -> None:
    first, second = (trio.float_model, trio.fake) if mode == "FvsQ" else (trio.fake, trio.integer)
    node = next(node for node in trio.fake.graph.nodes if node.op == "conv")
    table = channel_similarity(first, second, list(trio.batches), [node.name], mode)
    a, b = (outputs(m, trio.batches, node.name) for m in (first, second))
    a, b = (np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in (a, b))
    assert [row.channel for row in table.rows] == list(range(len(a)))
    scale = trio.fake.qtype(node.name).scale
    for row, x, y in zip(table.rows, a, b, strict=True):
        assert (row.min, row.max) == pytest.approx((x.min(), x.max()), abs=1e-5)
        assert (row.mean, row.var) == pytest.approx((x.mean(), x.var()), abs=1e-4)
        assert row.scale == pytest.approx(scale)
        assert row.max_abs == pytest.approx(np.abs(x - y).max(), abs=1e-5)
        if mode == "FvsQ":
            assert row.mse == pytest.approx(np.square(x - y).mean(), rel=1e-3)
            assert row.sqnr_db == pytest.approx(10 * np.log10(np.square(x).sum() / np.square(x - y).sum()), abs=0.01)
            assert row.cosine == pytest.approx((x @ y) / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-5)
            assert row.max_lsb == pytest.approx(row.max_abs / scale)


@pytest.fixture
def small_channel() -> tuple[nn.Module, FakeQuantModel, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        conv.weight[2] *= 0.01
        conv.bias.zero_()  # type: ignore[union-attr]
        conv.weight[3] = 0.0
    net = model(lambda m, x: m.fc(F.relu(m.conv(x)).mean((2, 3))), conv=conv, fc=nn.Linear(4, 3))
    x = images(8)
    return net, calibrated(net, x), x


def test_a_channel_that_hides_behind_others_is_the_worst(small_channel: Any) -> None:
    net, fake, x = small_channel
    table = channel_similarity(net, fake, [x], ["conv"])
    assert table.by_error().rows[0].channel == 2
    dead = table.rows[3]
    assert (dead.min, dead.max, dead.cosine, dead.sqnr_db) == (0.0, 0.0, 0.0, math.inf)
    rows = list(csv.reader(io.StringIO(table.by_error().csv())))
    assert tuple(rows[0]) == COLUMNS
    assert [row[1] for row in rows[1:3]] != ["0", "1"]


def test_modules_come_in_forward_order_and_linears_by_their_last_axis(small_channel: Any) -> None:
    net, fake, x = small_channel
    rows = channel_similarity(net, fake, [x], ["fc", "conv"]).rows
    assert [row.module for row in rows] == ["conv"] * 4 + ["fc"] * 3


def test_names_and_axes_that_there_are_none(small_channel: Any) -> None:
    net, fake, x = small_channel
    with pytest.raises(QConfigError, match=r"QAT144.*'nowhere'"):
        channel_similarity(net, fake, [x], ["nowhere"])
    for axis in (0, 4, -5):
        with pytest.raises(ConfigError, match="QAT217 axis: is"):
            channel_similarity(net, fake, [x], ["conv"], axis=axis)


def test_another_axis(small_channel: Any) -> None:
    net, fake, x = small_channel
    assert len(channel_similarity(net, fake, [x], ["conv"], axis=-1).rows) == x.shape[-1]


def test_the_input_is_named_as_in_the_tables(small_channel: Any) -> None:
    net, fake, x = small_channel
    assert len(channel_similarity(net, fake, [x], ["x"]).rows) == 3
