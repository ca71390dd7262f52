"""The resume checkpoint of QAT: one file that holds everything the next step depends on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatlib.pipeline.checkpoint import load_weights, read_metadata, save_tensors


@dataclass
class Progress:
    """Where the training stands. ``step`` counts finished steps over all epochs; ``epoch`` is the one under way."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def save_progress(path: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write ``path`` whole or not at all."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in progress.best_weights.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
    numbers = {
        "epoch": progress.epoch,
        "step": progress.step,
        "loss_sum": progress.loss_sum.hex(),
        "best": progress.best,
        "history": progress.history,
    }
    save_tensors(path, tensors, {"progress": json.dumps(numbers)})


def load_progress(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Put model and optimizer where :func:`save_progress` left them; None if there is no such file."""
    if not path.exists():
        return None
    numbers = json.loads(read_metadata(path)["progress"])
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    for name, tensor in load_weights(path).items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    model.load_state_dict(groups["model"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in groups["optimizer"].items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(
        numbers["epoch"],
        numbers["step"],
        float.fromhex(numbers["loss_sum"]),
        numbers["best"],
        numbers["history"],
        groups["best"],
    )
