"""Device, threads, seeds and determinism, set once at the start of a stage."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from qatlib.errors import StageError
from qatlib.pipeline.config import RuntimeParams


def setup(runtime: RuntimeParams) -> torch.device:
    """Apply ``runtime`` to this process and return the device: of several processes each has the GPU of its number.

    CPU kernels without a deterministic form raise when called; CUDA ones warn, because common backward kernels have
    none there. TF32 is off. Raises StageError QAT191 if the device is not there.
    """
    device = torch.device(runtime.device)
    if device.type == "cuda" and runtime.processes > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
    if device.type == "cuda":
        # cuBLAS reads it when the first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        _check_cuda(device)
    torch.set_num_threads(runtime.threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    random.seed(runtime.seed)
    np.random.seed(runtime.seed)
    torch.manual_seed(runtime.seed)
    return device


def _check_cuda(device: torch.device) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise StageError(
            "QAT191", "runtime.device", f"is {str(device)!r} but torch sees no CUDA device", "Set runtime.device to cpu"
        )
    if (device.index or 0) >= count:
        raise StageError(
            "QAT191", "runtime.device", f"is {str(device)!r}; there are cuda:0 to cuda:{count - 1}", "Name one of these"
        )
