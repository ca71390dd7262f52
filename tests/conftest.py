"""What every test leaves behind, and how pytest-xdist deals the tests out (``pytest -n 2 --dist loadfile``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

ONE_PROJECT = ("tests/pipeline/test_repro.py", "tests/pipeline/test_distributed.py")
"""Files whose tests share the project of ``tests/pipeline/conftest.py``, a minute to make: one process has them all."""


@pytest.hookimpl(optionalhook=True)  # pytest without pytest-xdist does not know it
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is dealt out whole, ``ONE_PROJECT`` as if it were one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return ONE_PROJECT[0] if file in ONE_PROJECT else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Threads and determinism, which a Project sets for its process, are put back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
