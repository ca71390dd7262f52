"""Several processes: calibration to the bit, QAT within float rounding, one message, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qatlib.fake import calibrate, op
from qatlib.fake.fake_quant import ConstantFakeQuantize
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.pipeline.data import loader
from tests.ops.test_masks import STYLES, Net, X
from tests.pipeline.conftest import Repository
from tests.pipeline.test_data import listed
from tests.pipeline.test_repro import digest, read

CALIBRATED, TRAINED = "artifacts/calibrated.safetensors", "artifacts/qat.safetensors"


def two(repository: Repository, folder: Path, **sections: Any) -> Repository:
    """A copy whose stages run in two processes."""
    copy = repository.copy(folder)
    copy.set(runtime={"processes": 2}, **sections)
    return copy


def weights(repository: Repository) -> dict[str, Tensor]:
    return load_file(repository.folder / TRAINED)


@pytest.mark.parametrize("method", ["min_max", "percentile", "mse"])
@pytest.mark.slow
def test_calibration_is_the_same_to_the_bit(fresh: Repository, tmp_path: Path, method: str) -> None:
    """Three batches, so that one process has one more than the other."""
    settings: dict[str, Any] = {"method": method, "batches": 3, "batch_size": 16}
    alone = fresh.copy(tmp_path / "alone")
    alone.set(calibrate=settings)
    pair = two(fresh, tmp_path / "pair", calibrate=settings)
    for repository in (alone, pair):
        repository.stage("calibrate")
    assert digest(pair.folder / CALIBRATED) == digest(alone.folder / CALIBRATED)
    metrics = [read(repository, "reports/calibrate/metrics.json") for repository in (alone, pair)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["calib"]["calibration_images"] == 48


@pytest.mark.slow
@pytest.mark.parametrize("averaging_constant", [0, 0.1])
def test_training_is_the_same_within_float_rounding(
    finished: Repository, tmp_path: Path, averaging_constant: float
) -> None:
    """Two steps, before a weight that lies between two codes makes more of the rounding; the second of one item, so
    that both processes have it.
    """
    settings: dict[str, Any] = {"averaging_constant": averaging_constant, "batch_size": 511, "epochs": 1}
    alone = finished.copy(tmp_path / "alone")
    alone.set(qat=settings)
    pair = two(finished, tmp_path / "pair", qat=settings)
    for repository in (alone, pair):
        repository.stage("qat")
    one, other = weights(alone), weights(pair)
    assert read(alone, "reports/qat/metrics.json")["qat"]["best_epoch"] == 1
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6, msg=name)
    losses = [(r.folder / "reports/qat/history.csv").read_text().splitlines()[-1].split(",")[2] for r in (alone, pair)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


@pytest.mark.slow
def test_a_killed_pair_leaves_no_process_and_goes_on_to_the_same_bytes(finished: Repository, tmp_path: Path) -> None:
    repository = two(finished, tmp_path / "p", qat={"epochs": 20, "lr": 0.003})
    command = [sys.executable, "-m", "stages.qat"]
    process = subprocess.Popen(command, cwd=repository.folder, env=repository.environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(repository.folder.glob(".qatlib/scratch/*/resume.safetensors")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while workers_in(repository.folder) and time.time() < deadline:
        time.sleep(0.1)
    assert not workers_in(repository.folder)
    repository.stage("qat")
    resumed = digest(repository.folder / TRAINED)
    repository.stage("qat")
    assert digest(repository.folder / TRAINED) == resumed


def workers_in(folder: Path) -> list[int]:
    """Processes whose current folder is ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_what_one_process_meets_is_one_message(finished: Repository, tmp_path: Path) -> None:
    repository = two(finished, tmp_path / "p", data={"kwargs": {"spoil": "late train label"}})
    done = repository.stage("qat", check=False)
    assert done.returncode == 1
    assert done.stderr.count("QAT") == 1
    assert done.stderr.strip().startswith("QAT113 epoch 1 step")


@pytest.mark.slow
def test_another_number_of_processes_is_refused(finished: Repository, tmp_path: Path) -> None:
    repository = two(finished, tmp_path / "p")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m"]
    done = repository.run(*torchrun, "stages.qat", check=False)
    assert done.returncode == 1
    assert "QAT198 runtime.processes: is 2, but torchrun started 3 processes" in done.stderr


def test_rows_and_batches_are_dealt_out() -> None:
    dataset = listed(7, change=lambda item: (item[0] + torch.rand(()), item[1]))

    def rows(**dealt: Any) -> list[list[float]]:
        return [inputs[0][:, 0].tolist() for inputs, _ in loader(dataset, 3, shuffle_seed=5, epoch=2, **dealt)]

    whole = rows()
    parts = [rows(part=(k, 2)) for k in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        if len(batch) > 1:
            assert (first, second) == (batch[0::2], batch[1::2])
        else:
            assert first == second == batch
    assert rows(stride=2) == whole[0::2]
    assert rows(start_batch=1, stride=2) == whole[1::2]


def assert_alike(finished: Repository, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Two processes train to the weights of one, within float rounding."""
    alone = finished.copy(tmp_path / "alone")
    alone.set(qat=settings)
    pair = two(finished, tmp_path / "pair", qat=settings)
    for repository in (alone, pair):
        repository.stage("qat")
    one, other = weights(alone), weights(pair)
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rest", [2, 3])
def test_learned_scales_are_the_same_within_float_rounding(finished: Repository, tmp_path: Path, rest: int) -> None:
    """The last batch leaves one process one row of three: both have to try whether that is enough."""
    settings: dict[str, Any] = {"fake_quant": "lsq", "batch_size": 512 - rest, "epochs": 1, "scale_lr_factor": 0.1}
    assert_alike(finished, tmp_path, settings)


@pytest.mark.slow
def test_kept_batch_norms_are_those_of_the_whole_batch(finished: Repository, tmp_path: Path) -> None:
    """The last batch leaves one process one row of three: statistics of its own would not do."""
    settings: dict[str, Any] = {"batch_norm": "keep", "batch_size": 509, "epochs": 1}
    assert_alike(finished, tmp_path, settings)


@pytest.mark.slow
def test_one_row_for_one_process_and_two_for_the_other(finished: Repository, tmp_path: Path) -> None:
    settings = {"averaging_constant": 0.1, "batch_size": 509, "epochs": 1}
    two(finished, tmp_path / "pair", qat=settings).stage("qat")


def test_room_for_masks_in_a_constant_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    body, mask = STYLES["constant with a bias"]
    net = Net(body).eval()
    alone, pair = (prepare_qat_fx(net, get_default_qconfig("int8", "min_max"), example_inputs=(X, mask)) for _ in "ab")
    calibrate.calibrate(alone, [((X, mask), None)])
    monkeypatch.setattr(calibrate, "size", lambda: 2)
    monkeypatch.setattr(op, "largest", lambda x: 2 * x)
    calibrate.calibrate(pair, [((X, mask), None)])
    rooms = [
        float(fake.room)
        for model in (alone, pair)
        for _, each in model.ops()
        if isinstance(fake := each.activation_post_process, ConstantFakeQuantize) and fake.below_maximum
    ]
    assert rooms[1] == 2 * rooms[0] > 0
