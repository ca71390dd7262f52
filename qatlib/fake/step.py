"""One training step, and the guards around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatlib.errors import DataError, TrainingError
from qatlib.fake.distill import Distillation
from qatlib.fake.distributed import add_gradients, summed
from qatlib.fake.float_form import calibrated_form, float_form
from qatlib.fake.guards import Fault, Place, batch_of_one, check_targets, cures, forward_fault, gradient_fault
from qatlib.fake.learned import count_all_rows
from qatlib.fake.model import FakeQuantModel
from qatlib.pipeline.data import check_finite, seeded

Loss = Callable[[Any, Any], Tensor]


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside depend on ``seed`` alone: so a step is the same after a resume. Generators are put back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), seeded(seed):
        torch.manual_seed(seed)
        yield


@dataclass
class Step:
    """Objective, gradient and update of one batch.

    ``forward`` takes the place of ``model`` where the objective is computed, such as :class:`ExactForward`. ``amp`` is
    the autocast dtype of that forward; the loss, the teacher and every value between two operators stay float32.
    """

    model: FakeQuantModel
    optimizer: torch.optim.Optimizer
    loss: Loss
    clip_grad_norm: float | None = None
    distillation: Distillation | None = None
    forward: Callable[..., Any] | None = None
    amp: torch.dtype | None = None

    def __call__(self, inputs: tuple[Tensor, ...], targets: Any, place: Place) -> float:
        """Train on one batch; returns its objective before the update.

        Of several processes each has some rows of the batch: objective and gradient are means over all rows, so the
        objective has to be a mean over its rows too.

        Raises TrainingError (QAT162) if the objective, or the norm of its gradient, is not finite, naming the first
        tensor that is not; DataError QAT112 for targets, QAT113 for labels that the loss refuses.
        """
        check_targets(targets, place)
        try:
            loss = self.objective(self._forward, inputs, targets)
        except TrainingError as error:
            raise self._not_finite(place, error.seen, self._behind(inputs, place)) from None
        except IndexError as error:
            raise _refused(place, error) from None
        except ValueError as error:
            raise batch_of_one(error, place.said()) from None
        rows = len(inputs[0])
        weight = rows / summed(rows)
        value = float(loss.detach())
        total = summed(weight * value)
        if not math.isfinite(total):
            where = "" if not math.isfinite(value) else " in another process"
            raise self._not_finite(place, f"loss is {total}{where}", self._behind(inputs, place))
        self.optimizer.zero_grad(set_to_none=True)
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        count_all_rows(self.model, weight)
        add_gradients(self.model.parameters())
        limit = math.inf if self.clip_grad_norm is None else self.clip_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if not math.isfinite(norm):
            said = f"gradient norm is {norm} at a loss of {total:.4g}"
            raise self._not_finite(place, said, gradient_fault(self.model))
        self.optimizer.step()
        return total

    def _forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(inputs[0].device.type, self.amp, enabled=self.amp is not None):
            return (self.forward or self.model)(*inputs)

    def objective(self, forward: Callable[..., Any], inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        """The loss on the targets, or its blend with the distance to the teacher."""
        outputs = forward(*inputs)
        if self.distillation is None:
            return self.loss(outputs, targets)
        return self.distillation.objective(outputs, inputs, lambda: self.loss(outputs, targets))

    def before_training(self, inputs: tuple[Tensor, ...], targets: Any, place: Place) -> tuple[float, float]:
        """Objective of the calibrated model and of its float form; changes nothing. Raises DataError (QAT113)."""

        def value(form: Callable[..., Any]) -> float:
            return float(self.objective(lambda *x: form(self.model, *x), inputs, targets))

        try:
            with torch.no_grad():
                weight = len(inputs[0]) / summed(len(inputs[0]))
                return summed(weight * value(calibrated_form)), summed(weight * value(float_form))
        except IndexError as error:
            raise _refused(place, error) from None

    def _behind(self, inputs: tuple[Tensor, ...], place: Place) -> Fault:
        check_finite(inputs, "train", place.batch, place.items() or None)
        return forward_fault(self.model, inputs)

    @staticmethod
    def _not_finite(place: Place, seen: str, fault: Fault) -> TrainingError:
        return TrainingError("QAT162", place.said(fault.rows), f"{seen}; {fault.what}", cures(place.lr))


def _refused(place: Place, error: IndexError) -> DataError:
    fix = "Correct the labels of the train split, or the number of classes in model.kwargs"
    return DataError("QAT113", place.said(), f"the loss refuses the targets: {error}", fix)
