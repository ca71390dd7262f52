"""Fixtures shared by the analysis tests."""

from __future__ import annotations

import pytest

from tests.analysis.analysis_nets import Trio, build_trio


@pytest.fixture(scope="session")
def trio() -> Trio:
    return build_trio()
