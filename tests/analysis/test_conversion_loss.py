"""What conversion loses, op by op, and the samples on which neighbours differ most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.analysis.bad_case import find_bad_case
from qatlib.analysis.conversion_loss import bisect_conversion
from qatlib.conversion import convert_fx
from qatlib.errors import ConfigError
from qatlib.fake.float_form import float_form
from qatlib.fake.model import FakeQuantModel
from qatlib.tables import TableSpec
from tests.analysis.test_sensitivity import noise_of
from tests.models import calibrated, everything, images


@pytest.fixture(scope="module")
def net() -> FakeQuantModel:
    return calibrated(everything(), images(8))


class Curved(nn.Module):
    """A table among convolutions: in integers, exp with a steep and clipped table is what loses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(torch.exp(self.second(F.relu(self.first(x)))))
        return out


def converted(range_: tuple[float, float] | None) -> tuple[FakeQuantModel, Any]:
    fake = calibrated(Curved(), images(16, size=8))
    tables = {} if range_ is None else {"exp": TableSpec(range=range_)}
    return fake, convert_fx(fake, tables=tables)


def test_bisection_names_the_op_that_conversion_ruins() -> None:
    fake, integer = converted((-0.1, 0.1))
    data = [images(8, size=8, seed=3), images(4, size=8, seed=4)]
    seen = bisect_conversion(fake, integer, data)
    assert [unit.name for unit in seen.smallest] == ["exp"]
    assert seen.explained > 0.9
    assert seen.ranked()[0].unit.name == "exp"
    assert seen.samples == 12
    x = torch.cat(data)
    exact, lost = fake(x).detach(), integer(x)
    assert seen.whole.noise == pytest.approx(noise_of(exact, lost), rel=1e-6)
    kept = convert_fx(fake, ["exp"], tables={})
    assert seen.preserved.noise == pytest.approx(noise_of(exact, kept(x)), rel=1e-6)


def test_a_conversion_that_loses_little_has_shares_that_are_small_numbers() -> None:
    fake, integer = converted(None)
    seen = bisect_conversion(fake, integer, images(8, size=8, seed=3), explained=1.0)
    assert seen.whole.sqnr_db > 35
    assert {trial.unit.name for trial in seen.trials} >= {"first", "second", "exp", "third"}
    with pytest.raises(ConfigError, match="QAT217"):
        bisect_conversion(fake, integer, images(8, size=8), explained=0.0)


def test_the_planted_sample_is_the_worst(net: FakeQuantModel) -> None:
    data = images(24, seed=5)
    data[17] *= 60  # far outside of what was calibrated
    exact, rounded = float_form(net, data), net(data).detach()
    noises = [noise_of(exact[i], rounded[i]) for i in range(24)]
    seen = find_bad_case(everything(), net, list(data.split(7)), count=3)
    assert seen.samples == 24
    assert [case.index for case in seen.worst] == sorted(range(24), key=lambda i: -noises[i])[:3]
    assert seen.worst[0].index == 17
    assert torch.equal(seen.worst[0].inputs[0][0], data[17])
    assert seen.worst[0].noise == pytest.approx(noises[17], rel=1e-5)
    assert seen.median == pytest.approx(float(np.median(noises)), rel=1e-5)
    assert seen.times_median(seen.worst[0]) > 5


def test_the_worst_sample_of_conversion_by_an_error_of_ones_own() -> None:
    fake, integer = converted((-0.1, 0.1))
    data = images(12, size=8, seed=6)

    def largest(reference: list[Tensor], other: list[Tensor]) -> float:
        return float((reference[0] - other[0]).abs().max())

    wanted = (fake(data).detach() - integer(data)).abs().amax((1, 2, 3))
    seen = find_bad_case(fake, integer, data, "QvsQ", count=2, error=largest)
    assert [case.index for case in seen.worst] == wanted.argsort(descending=True)[:2].tolist()
    assert seen.worst[0].noise == pytest.approx(float(wanted.max()))
    with pytest.raises(ConfigError, match="QAT217"):
        find_bad_case(fake, integer, data, "QvsQ", count=0)
