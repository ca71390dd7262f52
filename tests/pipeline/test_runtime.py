"""Runtime: the device is there, and seeds, threads and determinism are really set."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from qatlib.errors import StageError
from qatlib.pipeline.config import RuntimeParams
from qatlib.pipeline.runtime import setup


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), float(np.random.rand())


def test_seeds_every_generator() -> None:
    setup(RuntimeParams(seed=7))
    first = draw()
    setup(RuntimeParams(seed=7))
    assert draw() == first
    setup(RuntimeParams(seed=8))
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_threads_device_and_determinism() -> None:
    assert setup(RuntimeParams(threads=2)) == torch.device("cpu")
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match=r"QAT191 runtime.device: is 'cuda' but .* Set runtime.device to cpu"):
        setup(RuntimeParams(device="cuda"))


def test_cuda_number_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(StageError, match=r"QAT191 runtime.device: is 'cuda:5'; there are cuda:0 to cuda:1"):
        setup(RuntimeParams(device="cuda:5"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
