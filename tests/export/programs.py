"""Programs and files that the export tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from qatlib.conversion import to_program
from qatlib.fake.model import set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.program import Program
from tests.case_builder import Builder, Case
from tests.models import calibrated


def program_of(module: nn.Module, *inputs: Tensor, preserve: tuple[str, ...] = (), **options: Any) -> Program:
    net = calibrated(module, *inputs, **options)
    set_fake_quantize(net, FakeQuantState.VALIDATION)
    return to_program(net, preserve)


def tensors(case: Case) -> list[Tensor]:
    return [torch.from_numpy(x) for x in case.inputs]


def builder(batch: int = 2, seed: int = 0) -> Builder:
    """A Builder for Programs written by hand."""
    return Builder(batch, np.random.default_rng(seed))


def run(path: Path, *inputs: Tensor) -> list[np.ndarray[Any, Any]]:
    """Outputs of the document as a user would get them."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return list(session.run(None, feeds))


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}
