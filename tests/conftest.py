"""How pytest-xdist deals the tests out, where it is asked for several processes (``pytest -n 2 --dist loadfile``)."""

from __future__ import annotations

from typing import Any

import pytest

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
