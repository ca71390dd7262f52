"""The metrics in git are what the pipeline gives: equal on the machine that made them, near on another processor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.examples.needed import unavailable

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.01
"""On a share of images or a ratio: other float kernels train another model of the same quality."""
CHOICES = ("best_epoch",)
"""Which of nearly equal scores is the best may differ where the scores differ by an image."""
COUNTS = ("images", "epochs", "parameters", "ops", "islands", "nodes", "elements", "passed", "failed")


def numbers(document: Any, path: str = "") -> dict[str, float]:
    if isinstance(document, dict):
        return {k: v for key, value in document.items() for k, v in numbers(value, f"{path}.{key}").items()}
    is_number = isinstance(document, int | float) and not isinstance(document, bool)
    return {path: float(document)} if is_number else {}


@pytest.mark.slow
def test_a_full_regenerate_gives_the_committed_metrics(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name, follow_symlinks=False)
    for metrics in tmp_path.glob("reports/*/metrics.json"):
        metrics.unlink()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    done = subprocess.run(
        ["dvc", "repro", "--force"], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if "QAT116" in done.stderr:
        unavailable("Fashion-MNIST cannot be had here")
    assert done.returncode == 0, done.stderr
    compared = 0
    for committed in [*sorted(ROOT.glob("reports/*/metrics.json")), ROOT / "reports/summary.json"]:
        before = numbers(json.loads(committed.read_text()))
        after = numbers(json.loads((tmp_path / committed.relative_to(ROOT)).read_text()))
        assert set(before) == set(after)
        for key, value in before.items():
            if key.endswith(CHOICES):
                continue
            exact = key.rpartition(".")[2].endswith(COUNTS)
            assert after[key] == (value if exact else pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)), key
            compared += 1
    assert compared > 30
