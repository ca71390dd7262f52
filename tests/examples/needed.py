"""What a test does without something that cannot be in git: data, downloads, artifacts of a pipeline.

Tests that need any of it are slow: the default suite runs in a fresh clone, without a network, and skips nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NoReturn

import pytest

from qatlib.errors import QatError


def unavailable(what: str) -> NoReturn:
    """Skip the test; fail it in CI, whose run brings everything, so that nothing is left out unnoticed there."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} (CI is set)")
    pytest.skip(what)


@contextlib.contextmanager
def available() -> Iterator[None]:
    """The block fetches something; where it cannot be had (QAT116) the test ends as in :func:`unavailable`."""
    try:
        yield
    except QatError as error:
        if error.code != "QAT116":
            raise
        unavailable(str(error))
