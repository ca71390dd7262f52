"""The optimizer of QAT, and the learning rate over the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qatlib.errors import ConfigError, TrainingError
from qatlib.fake.batch_norm import KeptBatchNorm
from qatlib.fake.learned import learned_parameters
from qatlib.pipeline.config import QatParams
from qatlib.pipeline.entry import describe, load_entry

_BUILT_IN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
}


def make_optimizer(params: QatParams, model: nn.Module) -> torch.optim.Optimizer:
    """``qat.optimizer`` over :func:`parameter_groups`, called with ``lr`` and ``qat.optimizer_kwargs``.

    Raises ConfigError: QAT103, QAT104 for an entry point that cannot be loaded, QAT105 if the call raises, QAT106 if it
    gives something else than an optimizer.
    """
    build = _BUILT_IN.get(params.optimizer) or load_entry(params.optimizer, "qat.optimizer")
    momentum = {"momentum": params.momentum} if params.optimizer == "sgd" else {}
    kwargs = {**momentum, **params.optimizer_kwargs}
    groups = parameter_groups(model, params.weight_decay, params.lr * params.scale_lr_factor)
    try:
        optimizer: Any = build(groups, lr=params.lr, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "QAT105",
            "qat.optimizer_kwargs",
            f"{params.optimizer} called with lr={params.lr:g} and {kwargs} raised {describe(error)}",
            "Pass what that optimizer takes",
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "QAT106",
            "qat.optimizer",
            f"{params.optimizer} returned a {type(optimizer).__name__}, not a torch.optim.Optimizer",
            "Return the optimizer",
        )
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float, scale_lr: float | None = None) -> list[dict[str, Any]]:
    """Weights, which decay; what has at most one axis (biases, norms), which does not; and learned scales, if any.

    Learned scales do not decay, and have the rate ``scale_lr``, by default that of the optimizer.
    """
    learned = learned_parameters(model)
    scales = {id(p) for p in learned}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in scales]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if learned:
        rate = {} if scale_lr is None else {"lr": scale_lr}
        groups.append({"params": learned, "weight_decay": 0.0, **rate})
    return groups


def check_owned(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise TrainingError (QAT193) if ``optimizer`` holds parameters that are not those of ``model``.

    It would train the float model, or nothing: preparing copies every parameter. QAT128 if it lacks the scales of batch
    norms that were taken out of their layers after it was built.
    """
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in held)
    if foreign:
        raise TrainingError(
            "QAT193",
            f"optimizer {type(optimizer).__name__}",
            f"{foreign} of its {len(held)} parameters are not parameters of the fake-quant model, so training would not"
            " move them: it was built before the model was prepared",
            "Build it from model.parameters() of what prepare_qat_fx returned",
        )
    norms = {
        id(part.weight) for part in model.modules() if isinstance(part, KeptBatchNorm) and part.weight.requires_grad
    }
    if lacking := norms - {id(parameter) for parameter in held}:
        raise TrainingError(
            "QAT128",
            f"optimizer {type(optimizer).__name__}",
            f"the scales of {len(lacking)} of {len(norms)} kept batch norms are not among its parameters",
            "Call keep_batch_norms(model) before you build it from model.parameters()",
        )


@dataclass(frozen=True)
class Schedule:
    """Factor on the learning rate at every step: linear warm-up, then ``qat.schedule`` over all ``total`` steps."""

    params: QatParams
    total: int

    def factor(self, step: int) -> float:
        """1 for constant; cosine falls to 0; step multiplies by gamma at each milestone."""
        p, total = self.params, max(1, self.total)
        if step < p.warmup_steps:
            return (step + 1) / (p.warmup_steps + 1)
        if p.schedule == "cosine":
            done = (step - p.warmup_steps) / max(1, total - p.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if p.schedule == "step":
            return float(p.gamma ** sum(step >= fraction * total for fraction in p.milestones))
        return 1.0


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Give every group ``factor`` times the rate it was built with; returns that of the first group."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
