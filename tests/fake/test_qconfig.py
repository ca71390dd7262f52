"""Settings of fake-quant are checked where they are made."""

from __future__ import annotations

from typing import Any

import pytest

from qatlib.errors import QConfigError
from qatlib.fake.qconfig import FakeQuantSpec, QConfig


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"method": "entropy"}, "method 'entropy'"),
        ({"percentile": 0.0}, "percentile 0.0"),
        ({"percentile": 100.5}, "percentile 100.5"),
        ({"bins": 2047}, "bins 2047"),
        ({"averaging_constant": 1.5}, "averaging_constant 1.5"),
    ],
)
def test_an_illegal_setting_is_named(settings: dict[str, Any], seen: str) -> None:
    with pytest.raises(QConfigError, match=f"QAT142 FakeQuantSpec: {seen}. Use "):
        FakeQuantSpec(**settings)


@pytest.mark.parametrize("settings", [{"activation": "int16"}, {"weight": "int16"}, {"weight": None}])
def test_a_format_alone_is_no_spec(settings: dict[str, Any]) -> None:
    ((name, given),) = settings.items()
    with pytest.raises(QConfigError, match=f"QAT142 QConfig: {name} is {given!r}, which is no FakeQuantSpec"):
        QConfig(**settings)


def test_no_spec_for_the_activation_asks_for_a_high_precision_output() -> None:
    assert QConfig(activation=None).activation is None
