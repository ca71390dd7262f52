"""Distillation: the float model's outputs as a second target of QAT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from qatlib.errors import DataError
from qatlib.pipeline.config import DistillParams
from qatlib.pipeline.entry import load_entry

DistillLoss = Callable[[Any, Any, float], Tensor]
"""``(outputs, teacher's outputs, temperature) -> scalar``."""


def kl(outputs: Any, wanted: Any, temperature: float) -> Tensor:
    """``T² KL(softmax(wanted / T) ‖ softmax(outputs / T))`` over axis 1, mean over the rest: Hinton et al., 2015.

    Both are scores ``[N, C, …]``. Raises DataError (QAT114) for outputs of another form.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        seen = f"of shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise DataError("QAT114", "qat.distill", f"kl needs scores [N, C, ...]; the output is {seen}", "Use loss: mse")
    student, teacher = (F.log_softmax(x / temperature, 1) for x in (outputs, wanted))
    apart = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean()
    return apart * temperature**2


def mse(outputs: Any, wanted: Any, temperature: float) -> Tensor:
    """Mean over all outputs, however nested, of the mean squared difference; integer outputs are left out.

    Raises DataError (QAT114) where no output is real.
    """
    pairs = zip(tree_leaves(outputs), tree_leaves(wanted), strict=True)
    parts = [F.mse_loss(x, y) for x, y in pairs if isinstance(x, Tensor) and x.is_floating_point()]
    if not parts:
        raise DataError("QAT114", "qat.distill", "mse finds no real output", "Name a loss of your own")
    return torch.stack(parts).mean()


@dataclass(frozen=True)
class Distillation:
    """``weight`` of the objective is the distance to the teacher, the rest the loss on the targets."""

    teacher: nn.Module
    weight: float
    temperature: float = 4.0
    loss: DistillLoss = kl

    @classmethod
    def of(cls, params: DistillParams, teacher: nn.Module) -> Distillation:
        """By ``qat.distill``; raises ConfigError (QAT103, QAT104) for a loss that cannot be loaded."""
        built_in: dict[str, DistillLoss] = {"kl": kl, "mse": mse}
        loss = built_in.get(params.loss) or load_entry(params.loss, "qat.distill.loss")
        return cls(teacher, params.weight, params.temperature, loss)

    def objective(self, outputs: Any, inputs: tuple[Tensor, ...], task: Callable[[], Tensor]) -> Tensor:
        """``(1 - weight) task + weight distance``; a task of weight 0 is not computed, so it needs no labels."""
        with torch.no_grad():
            wanted = self.teacher.eval()(*inputs)
        distance = self.weight * self.loss(outputs, wanted, self.temperature)
        return distance if self.weight == 1 else (1 - self.weight) * task() + distance
