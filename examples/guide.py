"""The flow of docs/tuning-guide.md as plain calls: ``python -m examples.guide`` in the project root, some seconds.

Float → calibrate → VALIDATION → compare with float; convert → compare with fake-quant. The tables and the page of each
comparison go to ``guide-reports``, or to the folder that is named.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from examples.digits.digits import build_data
from examples.digits.train import accuracy, train
from qatlib import FakeQuantState, calibrate, convert_fx, model_profiler, prepare_qat_fx, set_fake_quantize
from qatlib.analysis.findings import Finding


def main(folder: Path) -> None:
    """Print scores and findings of each step; write the comparisons into ``folder``."""
    model, test = train(), build_data("test")
    print(f"float       {accuracy(model, test):.4f}")

    images = DataLoader(build_data("val"), batch_size=64)  # real inputs for the comparisons
    fake = prepare_qat_fx(model, example_inputs=[build_data("calib").images[:2]])
    calibrate(fake, DataLoader(build_data("calib"), batch_size=64))
    set_fake_quantize(fake.eval(), FakeQuantState.VALIDATION)
    print(f"calibrated  {accuracy(fake, test):.4f}")
    show(model_profiler(model, fake, images, mode="FvsQ", out_dir=folder / "calibrated"))

    integer = convert_fx(fake)
    print(f"integer     {accuracy(integer, test):.4f}")
    show(model_profiler(fake, integer, images, mode="QvsQ", out_dir=folder / "integer"))


def show(findings: tuple[Finding, ...]) -> None:
    """Print what was found, and the edit that cures it."""
    for finding in findings:
        print(f"  {finding.code} {finding.severity} {finding.module}: {finding.title}\n    {finding.edit}")
    if not findings:
        print("  nothing found")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("guide-reports"))
