"""Rounding the parameters once for several runs."""

from __future__ import annotations

from unittest.mock import patch

import torch

from qatlib.fake.fake_quant import WeightFakeQuantize
from tests.models import calibrated, everything, images


def test_runs_with_held_parameters_round_them_once_and_give_the_same_values() -> None:
    x = images(seed=1)
    fake = calibrated(everything(), x)
    weighted = sum(op.weight_fake_quant is not None for _, op in fake.ops())
    assert weighted > 1
    rounded = WeightFakeQuantize.quantized
    with torch.no_grad(), patch.object(WeightFakeQuantize, "quantized", autospec=True, side_effect=rounded) as counted:
        expected = fake(x)
        assert counted.call_count == weighted
        with fake.held_parameters(), fake.held_parameters():
            first, second = fake(x), fake(x)
        assert counted.call_count == 2 * weighted
    torch.testing.assert_close(first, expected, rtol=0, atol=0)
    torch.testing.assert_close(second, expected, rtol=0, atol=0)


def test_afterwards_changed_weights_are_seen() -> None:
    x = images(seed=1)
    fake = calibrated(everything(), x)
    with torch.no_grad():
        with fake.held_parameters():
            before = fake(x)
        for parameter in fake.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(fake(x), before)
